"""The programs that learn something, as sweeps see them: their settings, where a run lies, when it is over."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condense.continual_script import ContinualConfig, continual_folder
from condense.image_job import OPTIONS as IMAGE_OPTIONS
from condense.image_job import ImageConfig
from condense.job import OPTIONS as TEXT_OPTIONS
from condense.job import bank_folder, condense_folder, evaluate_folder
from condense.text_job import TextConfig
from config import Option, Section, flatten
from distill_feat.buffer import OPTIONS as BUFFER_OPTIONS
from distill_feat.buffer import BufferConfig, expert_folder
from distill_feat.datm import OPTIONS as DATM_OPTIONS
from distill_feat.dc import DC, DC_OPTIONS, DcConfig
from distill_feat.trajectory_job import TRAJECTORY_OPTIONS, TrajectoryRunConfig, method
from kd.kd_config import OF_TEACHER, SHARED, KdConfig
from kd.kd_config import OPTIONS as KD_OPTIONS
from kd.places import run_folder as kd_folder
from kd.scoring import COLUMNS
from kd.text_config import DistillTextConfig
from kd.text_config import run_folder as text_folder
from utils.expert_buffers import expert_file
from utils.run_folder import RESULT
from utils.teachers import missing_members

LEARNED = {"match": "match", "calib": "calibration", "best_val_micro": "validation, best"}


def has_result(folder: Path, cfg: Any) -> bool:
    """Whether the run says so."""
    return (folder / RESULT).exists()


def alone(cfg: Any) -> str:
    """No group."""
    return ""


@dataclass(frozen=True)
class Program:
    """A program, by what its settings `cfg` say."""

    schema: type[Section]
    options: tuple[Option, ...]
    folder: Callable[[Any], Path]  # of its run, or of all that it makes
    finished: Callable[[Path, Any], bool] = has_result
    seed: str = "seed"
    columns: Mapping[str, str] = field(default_factory=dict)  # of result.json, and what a table calls them
    group: Callable[[Any], str] = alone  # the same where one process can do several runs; "" where none can
    at_root: bool = False  # relative paths in its configurations start at the repository, not at its own folder


def has_teachers(folder: Path, cfg: Any) -> bool:
    """Whether all are there."""
    return not missing_members(folder, cfg.condense.num_premodel, cfg.condense.teacher_model_epoch)


def has_experts(folder: Path, cfg: BufferConfig) -> bool:
    """Whether all are there."""
    return all(expert_file(folder, number).exists() for number in range(cfg.experts.num_experts))


def shared_teacher(cfg: KdConfig) -> str:
    """What students of one teacher forward have in common."""
    keys = (*SHARED, *OF_TEACHER) if cfg.distils else SHARED
    return "" if cfg.apart else json.dumps({k: str(v) for k, v in flatten(cfg).items() if k.startswith(keys)})


PROGRAMS = {
    "condense/pretrain_script_text.py": Program(TextConfig, TEXT_OPTIONS, bank_folder, has_teachers),
    "condense/condense_script_text.py": Program(TextConfig, TEXT_OPTIONS, condense_folder, columns=LEARNED),
    "condense/evaluate_script_text.py": Program(TextConfig, TEXT_OPTIONS, evaluate_folder),
    "condense/pretrain_script.py": Program(ImageConfig, IMAGE_OPTIONS, bank_folder, has_teachers),
    "condense/condense_script.py": Program(ImageConfig, IMAGE_OPTIONS, condense_folder, columns=LEARNED),
    "condense/evaluate_script.py": Program(ImageConfig, IMAGE_OPTIONS, evaluate_folder),
    "condense/continual_script.py": Program(ContinualConfig, IMAGE_OPTIONS, continual_folder),
    "distill_feat/buffer.py": Program(BufferConfig, BUFFER_OPTIONS, expert_folder, has_experts, "experts.seed"),
    "distill_feat/dc.py": Program(DcConfig, DC_OPTIONS, DC.judge_folder),
    "distill_feat/mtt.py": Program(TrajectoryRunConfig, TRAJECTORY_OPTIONS, method("mtt").judge_folder),
    "distill_feat/datm.py": Program(TrajectoryRunConfig, DATM_OPTIONS, method("datm").judge_folder),
    "kd/train.py": Program(
        KdConfig, KD_OPTIONS, kd_folder, seed="SEED", columns=COLUMNS, group=shared_teacher, at_root=True
    ),
    "kd/distill_text.py": Program(DistillTextConfig, (), text_folder, at_root=True),
}
