"""Distillation of text models: bring a teacher, a student, batches and two adaptors.

Everything here and in `presets` is imported by its full name, so that a program in kd/, for which this folder is also
the top-level package `distilltool`, gets the same objects.
"""

from kd.distilltool.basic import BasicDistillation, BasicTraining
from kd.distilltool.checkpoints import save_points
from kd.distilltool.distillation import Distillation
from kd.distilltool.hugging_face import HuggingFaceAdaptor, expose_attentions
from kd.distilltool.matches import ADAPTOR_KEYS, FEATURES, KD_LOSS_MAP, MATCH_LOSS_MAP
from kd.distilltool.multi_task import MultiTaskDistillation
from kd.distilltool.multi_teacher import BasicMultiTeacherDistillation
from kd.distilltool.projections import PROJ_MAP
from kd.distilltool.settings import DistillationConfig, TrainingConfig
from kd.distilltool.transfer import init_student_from_layers

DistillConfig = DistillationConfig
TrainConfig = TrainingConfig
MultiTeacherDistillation = BasicMultiTeacherDistillation
BasicMultiTaskDistillation = MultiTaskDistillation

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "BasicDistillation",
    "BasicMultiTaskDistillation",
    "BasicMultiTeacherDistillation",
    "BasicTraining",
    "DistillConfig",
    "Distillation",
    "DistillationConfig",
    "HuggingFaceAdaptor",
    "MultiTaskDistillation",
    "MultiTeacherDistillation",
    "TrainConfig",
    "TrainingConfig",
    "expose_attentions",
    "init_student_from_layers",
    "save_points",
]
