"""Settings of `distill_text.py`, and the folders that follow from them."""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from config import LocalPath, Section, flatten, named
from kd.distilltool import DistillationConfig
from kd.distilltool.distillation import layers
from utils.run_folder import short_hash
from utils.utils_text import DatasetConfig

Arm = Literal["alone", "copied", "distilled_drawn", "distilled"]
ARMS: dict[Arm, str] = {
    "alone": "student alone",
    "copied": "student alone, from copied layers",
    "distilled_drawn": "student distilled, from drawn weights",
    "distilled": "student distilled",
}


class Model(Section):
    """A BERT of the width and heads of a preset, and its training by AdamW: linear warm-up, then half a cosine."""

    layers: int = Field(ge=1)
    width: Literal["tiny", "mini", "small", "base"] = "tiny"  # 128, 256, 512, 768
    dropout: float = Field(0.1, ge=0, lt=1)  # of embeddings and hidden states; probabilities of attention have none
    lr: tuple[float, ...] = (1e-3,)  # the best on validation is taken
    epochs: int = Field(ge=1)
    batch_size: int = Field(32, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps

    @model_validator(mode="after")
    def check_rates(self) -> "Model":
        """There is a rate, and all are rates."""
        if not self.lr or min(self.lr) <= 0 or len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr: {list(self.lr)}: give at least one, above 0 and each once")
        return self


class Student(Model):
    """Who learns what."""

    copied_layers: tuple[int, ...]  # of the teacher, 0 being its first block
    documents: int | None = Field(None, ge=1)  # of train, drawn anew by every seed; None: all
    arms: tuple[Arm, ...] = get_args(Arm)
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights, order, dropout and documents

    @model_validator(mode="after")
    def check(self) -> "Student":
        """Copied layers are as many as there are; arms and seeds are not empty."""
        if len(self.copied_layers) != self.layers:
            raise ValueError(f"copied_layers: {list(self.copied_layers)}, but the student has layers: {self.layers}")
        for key, given in (("arms", self.arms), ("seeds", self.seeds)):
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{key}: {list(given)}: give at least one, and each once")
        return self


class DistillTextConfig(Section):
    """A run of `kd/distill_text.py`."""

    dataset: DatasetConfig
    max_length: int = Field(64, ge=4)  # tokens
    vocab_size: int = Field(8000, ge=200)  # word pieces
    teacher: Model
    student: Student
    distill: DistillationConfig
    seed: int = 0  # of the teacher
    tf32: bool = True
    debug: bool = False  # tracebacks
    save_dir: LocalPath = Path("results/kd/text")
    pretrained_dir: LocalPath = Path("pretrained_models")
    cache_dir: LocalPath = Path("dataset/cache")

    @model_validator(mode="after")
    def check(self) -> "DistillTextConfig":
        """Rules across sections."""
        if self.distill.cache_teacher is not None:
            raise ValueError(
                f"distill.cache_teacher: {self.distill.cache_teacher!r}, but batches here are as long as their longest "
                "document; leave it out"
            )
        copied, depth = self.student.copied_layers, self.teacher.layers
        copies = {"copied", "distilled"} & {*self.student.arms}
        if copies and self.student.width != self.teacher.width:
            raise ValueError(
                f"student.width: {self.student.width}, but layers of a {self.teacher.width} teacher are copied; set "
                "student.arms: [alone, distilled_drawn]"
            )
        if wrong := [i for i in copied if not -depth <= i < depth]:
            raise ValueError(f"student.copied_layers: {wrong[0]}, but the teacher has layers 0 to {depth - 1}")
        for m in self.distill.intermediate_matches or ():
            for key, given, count in (("layer_T", m.layer_T, depth), ("layer_S", m.layer_S, self.student.layers)):
                last = count - (m.feature != "hidden")  # hidden 0 is the embedding
                if wrong := [i for i in layers(given) if not -last - 1 <= i <= last]:
                    raise ValueError(
                        f"distill.intermediate_matches: {key}: {wrong[0]}, but {m.feature} has entries 0 to {last}"
                    )
        wanted = {m.loss.startswith("attention_ce") for m in self.attention_matches}
        if len(wanted) > 1:
            raise ValueError(
                "distill.intermediate_matches: attention_ce compares logarithms and attention_mse probabilities; "
                "choose one of them"
            )
        return self

    @property
    def attention_matches(self) -> list[Any]:
        """Matches of attention."""
        return [m for m in self.distill.intermediate_matches or () if m.feature == "attention"]

    @property
    def attention(self) -> Literal["log", "probabilities"] | None:
        """As what attentions are compared."""
        if not self.attention_matches:
            return None
        return "log" if self.attention_matches[0].loss.startswith("attention_ce") else "probabilities"


ELSEWHERE = (
    "dataset.data_dir", "dataset.load_memory", "dataset.batch_real", "save_dir", "pretrained_dir", "cache_dir", "debug",
)  # fmt: skip


def run_folder(cfg: DistillTextConfig) -> Path:
    """Folder of a run, which the resolved configuration alone decides."""
    values = {key: value for key, value in flatten(cfg).items() if key not in ELSEWHERE}
    name = f"bert{cfg.teacher.layers}_bert{cfg.student.layers}_{short_hash(values)}"
    return cfg.save_dir / cfg.dataset.dataset / name


def teacher_folder(cfg: DistillTextConfig, texts: str) -> Path:
    """Folder of the teacher that the configuration and a corpus' fingerprint decide."""
    values = named(cfg, ("dataset.", "teacher.", "max_length", "vocab_size", "seed", "tf32"))
    values = {key: value for key, value in values.items() if key not in ELSEWHERE} | {"texts": texts}
    return cfg.pretrained_dir / cfg.dataset.dataset / "text_teachers" / f"bert{cfg.teacher.layers}_{short_hash(values)}"
