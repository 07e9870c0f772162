"""The two configurations: in Python, from a dict, a JSON or a YAML file, or as sections of a program's own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from config import ConfigError, PythonSection, Section, add_args_from_yaml
from kd.distilltool.checkpoints import steps_per_epoch
from kd.distilltool.matches import FEATURES, KD_LOSS_MAP, MATCH_LOSS_MAP, PAIRED, resolve
from kd.distilltool.projections import PROJ_MAP

Layer = int | tuple[int, int]


class Readable(PythonSection):
    """A configuration that is read from plain values; all problems are ConfigErrors of one line each."""

    @classmethod
    def require(cls, given: object, name: str) -> None:
        """Raise ConfigError unless argument `name` is one of these."""
        if not isinstance(given, cls):
            kind = cls.__name__
            raise ConfigError(f"{name}: {type(given).__name__}, not a {kind}; {kind}.from_dict makes one")

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> Self:
        """From a mapping, which is left as it is."""
        return cls(**dict_object)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """From a JSON file that holds one object."""
        try:
            values = json.loads(Path(json_file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{json_file}: not a readable JSON file: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f'{json_file}: holds no object; write {{"key": value}}')
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError("\n".join(f"{json_file}: {line}" for line in str(error).split("\n"))) from error

    @classmethod
    def from_yaml(cls, yaml_file: str | Path) -> Self:
        """From a YAML file, which may name a `base` beside it."""
        path = Path(yaml_file)
        return add_args_from_yaml(cls, path, (), path.parent).config


class TrainingConfig(Readable):
    """How a student is trained, logged and saved."""

    gradient_accumulation_steps: int = Field(1, ge=1)  # batches of one optimizer step
    ckpt_frequency: int = Field(1, ge=1)  # times that the weights are saved in a checkpointed epoch
    ckpt_epoch_frequency: int = Field(1, ge=1)  # every how many epochs is checkpointed
    log_dir: str | None = "./logs"  # None: no log
    output_dir: str = "./saved_models"
    device: str = "cuda"  # without CUDA the CPU, which is said
    amp: Literal["bfloat16", "float16"] | None = None  # networks under autocast; losses in float32
    resume: bool = False  # go on from output_dir/resume.pt where there is one

    @field_validator("log_dir", "output_dir", "device", mode="before")
    @classmethod
    def plain(cls, value: object) -> object:
        """Paths and devices as text."""
        return str(value) if isinstance(value, Path | torch.device) else value

    @field_validator("device")
    @classmethod
    def known(cls, value: str) -> str:
        """A device that torch can name."""
        try:
            return str(torch.device(value))
        except RuntimeError as error:
            raise ValueError(f"{value!r} is no device; write cuda, cuda:1 or cpu") from error

    def total_steps(self, batches: int, num_epochs: int) -> int:
        """Optimizer steps of `num_epochs` epochs of so many batches, as a schedule needs them."""
        return steps_per_epoch(batches, self.gradient_accumulation_steps) * num_epochs


class Match(Section):
    """One term on features: weight * loss(proj(student's feature), teacher's feature)."""

    layer_T: Layer  # which of the adaptor's list; two of them for gram and mmd
    layer_S: Layer
    feature: str
    loss: str
    weight: float = Field(allow_inf_nan=False)
    proj: tuple[Any, ...] | None = None  # name, width of the student, width of the teacher, options of its group

    @field_validator("feature")
    @classmethod
    def known_feature(cls, value: str) -> str:
        """One of FEATURES."""
        return resolve("feature", value, FEATURES)

    @field_validator("loss")
    @classmethod
    def known_loss(cls, value: str) -> str:
        """One of MATCH_LOSS_MAP."""
        return resolve("match loss", value, MATCH_LOSS_MAP)

    @field_validator("proj")
    @classmethod
    def known_proj(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """[name, dim_S, dim_T] or [name, dim_S, dim_T, options]."""
        return None if value is None else checked_proj(value)

    @model_validator(mode="after")
    def as_many_layers_as_the_loss_takes(self) -> "Match":
        """gram and mmd compare pairs."""
        for key, layer in (("layer_T", self.layer_T), ("layer_S", self.layer_S)):
            if self.loss in PAIRED and isinstance(layer, int):
                raise ValueError(f"{key}: {layer}, but {self.loss} compares pairs: write [{layer}, {layer}]")
            if self.loss not in PAIRED and isinstance(layer, tuple) and self.loss in BUILT_IN:
                raise ValueError(f"{key}: {list(layer)}, but {self.loss} takes one layer: write {layer[0]}")
        return self

    @property
    def name(self) -> str:
        """`hidden_mse hidden 10>3`: the teacher's layer, the student's."""
        return f"{self.loss} {self.feature} {shown(self.layer_T)}>{shown(self.layer_S)}"


BUILT_IN = tuple(MATCH_LOSS_MAP)


def shown(layer: Layer) -> str:
    """`3` or `3,5`."""
    return str(layer) if isinstance(layer, int) else ",".join(map(str, layer))


def checked_proj(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """A projection's name (resolved), its two widths, and the options of its group or None. Raises ConfigError."""
    name, *rest = value or ("",)
    widths, options = rest[:2], rest[2:]
    options = [] if options == [None] else options
    if len(widths) < 2 or any(type(width) is not int or width < 1 for width in widths) or len(options) > 1:
        raise ConfigError(f"{list(value)}: a name, dim_S and dim_T are needed, then options: ['linear', 384, 768]")
    if options and not isinstance(options[0], Mapping):
        raise ConfigError(
            f"{list(value)}: options of the optimizer are a mapping: ['linear', 384, 768, {{'lr': 1e-3}}]"
        )
    return resolve("projection", str(name), PROJ_MAP), *widths, dict(options[0]) if options else None


class DistillationConfig(Readable):
    """What a student learns: kd_loss_weight * kd + hard_label_weight * losses + the weighted matches.

    The logit loss has no factor T^2: beside other terms its gradient falls as 1 / T^2.
    """

    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    hard_label_weight: float = Field(0.0, ge=0, allow_inf_nan=False)  # of the sum of the student adaptor's losses
    kd_loss_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    kd_loss_type: str = "ce"
    intermediate_matches: tuple[Match, ...] | None = None
    cache_teacher: str | int | None = None  # where in a batch the samples' indices [B] stand: key, or place in a tuple

    @field_validator("kd_loss_type")
    @classmethod
    def known_loss(cls, value: str) -> str:
        """One of KD_LOSS_MAP."""
        return resolve("logit loss", value, KD_LOSS_MAP)
