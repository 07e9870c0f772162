"""The programs that learn something, as sweeps see them: their settings, where a run lies, when it is over."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condense import (
    condense_script,
    condense_script_text,
    continual_script,
    evaluate_script,
    evaluate_script_text,
    pretrain_script,
    pretrain_script_text,
)
from condense.job import bank_folder, condense_folder, evaluate_folder
from config import Option, Section, flatten
from distill_feat import buffer, datm, dc, mtt
from distill_feat.trajectory_job import method
from kd import distill_text, text_config, train
from kd.kd_config import OF_TEACHER, SHARED, KdConfig
from kd.places import run_folder
from kd.scoring import COLUMNS
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

    takes: tuple[type[Section], tuple[Option, ...]]  # schema and options
    folder: Callable[[Any], Path]  # of its run, or of all that it makes
    finished: Callable[[Path, Any], bool] = has_result
    seed: str = "seed"
    columns: Mapping[str, str] = field(default_factory=dict)  # of result.json, and what a table calls them
    group: Callable[[Any], str] = alone  # the same where one process can do several runs; "" where none can
    at_root: bool = False  # relative paths in its configurations start at the repository, not at its own folder


def has_teachers(folder: Path, cfg: Any) -> bool:
    """Whether all are there."""
    return not missing_members(folder, cfg.condense.num_premodel, cfg.condense.teacher_model_epoch)


def shared_teacher(cfg: KdConfig) -> str:
    """What students of one teacher forward have in common."""
    keys = (*SHARED, *OF_TEACHER) if cfg.distils else SHARED
    return "" if cfg.apart else json.dumps({k: str(v) for k, v in flatten(cfg).items() if k.startswith(keys)})


PROGRAMS = {
    "condense/pretrain_script_text.py": Program(pretrain_script_text.TAKES, bank_folder, has_teachers),
    "condense/condense_script_text.py": Program(condense_script_text.TAKES, condense_folder, columns=LEARNED),
    "condense/evaluate_script_text.py": Program(evaluate_script_text.TAKES, evaluate_folder),
    "condense/pretrain_script.py": Program(pretrain_script.TAKES, bank_folder, has_teachers),
    "condense/condense_script.py": Program(condense_script.TAKES, condense_folder, columns=LEARNED),
    "condense/evaluate_script.py": Program(evaluate_script.TAKES, evaluate_folder),
    "condense/continual_script.py": Program(continual_script.TAKES, continual_script.continual_folder),
    "distill_feat/buffer.py": Program(buffer.TAKES, buffer.expert_folder, buffer.has_experts, "experts.seed"),
    "distill_feat/dc.py": Program(dc.TAKES, dc.DC.judge_folder),
    "distill_feat/mtt.py": Program(mtt.TAKES, method("mtt").judge_folder),
    "distill_feat/datm.py": Program(datm.TAKES, method("datm").judge_folder),
    "kd/train.py": Program(train.TAKES, run_folder, seed="SEED", columns=COLUMNS, group=shared_teacher, at_root=True),
    "kd/distill_text.py": Program(distill_text.TAKES, text_config.run_folder, at_root=True),
}
