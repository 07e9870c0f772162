"""What the programs of every modality share: run folders, the teachers, and what a modality has to say for itself."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import model_validator
from torch import Tensor, nn

from condenser.evaluator import EvaluationConfig, StudentScore, TrainingSet
from condenser.matching import ClassCondenser, MatchConfig
from condenser.optimization import OptimizationConfig
from condenser.synthetic_set import SyntheticSet
from config import LocalPath, Option, Section, named
from config.loader import flatten
from utils.augment import Augmenter
from utils.data_config import DataConfig
from utils.ddp import World, distribute_class
from utils.report import Block
from utils.run_folder import claim, log, short_hash
from utils.stopping import StopFlag
from utils.teachers import (
    PretrainConfig,
    TeacherBank,
    load_bank,
    missing_members,
    train_bank,
)

OPTIONS = (
    Option("ipc", "condense.ipc", "value", "samples to learn per class"),
    Option("init", "condense.init", "value", "where they start", ("random", "noise", "mix", "load")),
    Option("load_path", "condense.load_path", "path", "a saved set for --init load"),
    Option("sampling_net", "condense.sampling_net", "flag", "learn the scales of the frequencies"),
)
# Of the evaluation section, what the held-out score does not read.
NOT_SCORE = ("rows", "repeat", "seeds", "which", "select", "probe_every", "architectures")


class JobConfig(Section):
    """The question that a run asks; every section is declared beside its reader."""

    dataset: DataConfig  # of the modality, as are the next and `condense`
    network: Section
    pretrain: PretrainConfig
    optimization: OptimizationConfig
    condense: MatchConfig
    evaluation: EvaluationConfig
    seed: int = 0
    tf32: bool = True
    debug: bool = False  # tracebacks, a log line an iteration, and only the first max(nclass // 100, 10) classes
    save_dir: LocalPath = Path("../results")
    pretrained_dir: LocalPath = Path("../pretrained_models")
    cache_dir: LocalPath = Path("../dataset/cache")

    @model_validator(mode="after")
    def check(self) -> "JobConfig":
        """Rules across sections."""
        if self.condense.teacher_model_epoch > self.pretrain.epochs:
            raise ValueError(
                f"condense.teacher_model_epoch: {self.condense.teacher_model_epoch} is after the last epoch, "
                f"pretrain.epochs: {self.pretrain.epochs}"
            )
        return self

    @property
    def data_name(self) -> str:
        """Name of the data set."""
        return self.dataset.dataset

    @property
    def nclass(self) -> int:
        """Number of its classes."""
        return self.dataset.nclass

    @property
    def multilabel(self) -> bool:
        """Whether a sample may have several labels."""
        raise NotImplementedError

    @property
    def net_name(self) -> str:
        """Kind of the teachers, as it stands in their folder's name."""
        raise NotImplementedError


class LabelledSet(TrainingSet, Protocol):
    """Real samples, as students, samplers and subsets read them."""

    def members(self) -> list[Tensor]: ...

    def subset(self, samples: Tensor) -> "LabelledSet": ...

    @property
    def nbytes(self) -> int: ...

    @property
    def data_bytes(self) -> int: ...


class Job(ABC):
    """Data and networks of a run on this rank; the part that each modality writes."""

    cfg: JobConfig
    world: World
    train: LabelledSet
    val: LabelledSet
    test: LabelledSet
    classes: Sequence[str]
    origin: dict[str, str]  # what the teachers and the learned set are made from
    program: str  # that condenses
    unit: str  # in which the real samples are counted, as in "uint16 token ids"

    @abstractmethod
    def fresh(self, seed: int, purpose: str, *ids: int) -> nn.Module:
        """A fresh network with weights of the stream (seed, purpose, ids...)."""

    def student(self, network: str, seed: int, purpose: str, *ids: int) -> nn.Module:
        """A fresh student; `network` names one of `architectures`."""
        return self.fresh(seed, purpose, *ids)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Kinds of students that rows are judged by; empty is the configured network."""
        return ("",)

    def augmenter(self, teachers: bool) -> Augmenter | None:
        """What teachers or students do to their batches; None leaves them as they are."""
        return None

    @abstractmethod
    def class_costs(self) -> list[float]:
        """Work of every class, to share classes out."""

    @abstractmethod
    def condenser(
        self, classes: Sequence[Sequence[int]], networks: tuple[nn.Module, nn.Module], bank: TeacherBank
    ) -> ClassCondenser:
        """The condenser of this rank's classes; classes[r] are those of rank r."""

    @abstractmethod
    def parts(self, data: TrainingSet) -> list[list[int]]:
        """Samples of a forward pass each."""

    @abstractmethod
    def student_view(self, found: SyntheticSet, path: Path) -> TrainingSet:
        """A learned set as students read it. Raises ConfigError where it does not fit the configuration."""

    @abstractmethod
    def pictures(self, found: SyntheticSet, run: Path, folder: Path) -> list[Block]:
        """What the learned samples of a condensation run look like; files go into `folder`."""

    @abstractmethod
    def linear(self, which: Tensor) -> StudentScore:
        """A linear classifier on plain features of the real samples `which`."""


def condense_folder(cfg: JobConfig) -> Path:
    """Folder of the condensation run: readable parts and a hash of all that the result depends on."""
    c, o = cfg.condense, cfg.optimization
    values = named(cfg, ("dataset.", "network.", "pretrain.", "optimization.", "condense.", "seed", "tf32", "debug"))
    values |= {f"score.{k}": v for k, v in named(cfg, ("evaluation.",)).items() if k.split(".")[1] not in NOT_SCORE}
    name = f"{c.dis_metrics}_{o.optimizer}_lr{o.lr_img:g}_f{c.num_freqs}_{c.init}_seed{cfg.seed}_{short_hash(values)}"
    return cfg.save_dir / "condense" / "condense" / cfg.data_name / f"ipc{c.ipc}" / name


def evaluate_folder(cfg: JobConfig) -> Path:
    """Folder of the evaluation of a run."""
    keep = {k: v for k, v in flatten(cfg).items() if not k.endswith("_dir") or k == "dataset.data_dir"}
    name = f"{condense_folder(cfg).name.rsplit('_', 1)[0]}_{short_hash(keep)}"
    return cfg.save_dir / "condense" / "evaluate" / cfg.data_name / f"ipc{cfg.condense.ipc}" / name


def bank_folder(cfg: JobConfig) -> Path:
    """Folder of the teachers: their name does not depend on ipc, so those of another ipc are taken where they exist."""
    values = named(cfg, ("dataset.", "network.", "pretrain.", "tf32")) | {"epoch": cfg.condense.teacher_model_epoch}
    values = {
        k: v for k, v in values.items() if k not in ("dataset.batch_real", "dataset.load_memory", "network.layer_index")
    }
    name = f"{cfg.net_name}_{short_hash(values)}"
    root = cfg.pretrained_dir / cfg.data_name
    own = root / f"ipc{cfg.condense.ipc}" / name
    others = sorted(root.glob(f"ipc*/{name}"))
    complete = [
        f for f in [own, *others] if not missing_members(f, cfg.condense.num_premodel, cfg.condense.teacher_model_epoch)
    ]
    return complete[0] if complete else own


def fresh_teacher(job: Job, member: int) -> nn.Module:
    """Teacher number `member` at its start."""
    return job.fresh(job.cfg.pretrain.seed, "teacher init", member)


def ensure_teachers(job: Job, flag: StopFlag) -> Path:
    """Train the teachers that are missing, each rank its share; their folder."""
    cfg, world = job.cfg, job.world
    folder = Path(world.broadcast(str(bank_folder(cfg))))
    epoch = cfg.condense.teacher_model_epoch
    if world.main:
        claim(folder, job.origin, "run the pretraining program with --overwrite")
    missing = world.broadcast(missing_members(folder, cfg.condense.num_premodel, epoch))
    if missing:
        log.info(f"training {len(missing)} of {cfg.condense.num_premodel} teachers into {folder}")
    elif folder.parent.name != f"ipc{cfg.condense.ipc}":
        log.info(f"using the teachers in {folder}")
    if missing:
        train_bank(
            folder, cfg.condense.num_premodel, epoch, lambda member: fresh_teacher(job, member), job.train,
            job.augmenter(teachers=True), cfg.pretrain, cfg.multilabel, world, flag,
        )  # fmt: skip
    return folder


def read_teachers(job: Job, folder: Path, like: nn.Module) -> TeacherBank:
    """The teachers of a folder, in memory."""
    c = job.cfg.condense
    return load_bank(folder, c.num_premodel, c.teacher_model_epoch, like.to(job.world.device), job.world.device)


def make_condenser(job: Job, teachers: Path) -> ClassCondenser:
    """The condenser of this rank's classes."""
    cfg, world = job.cfg, job.world
    classes = [
        distribute_class(cfg.nclass, cfg.debug, costs=job.class_costs(), rank=rank, size=world.size)
        for rank in range(world.size)
    ]
    if world.main and any(not part for part in classes):
        log.info(f"{world.size} ranks share {sum(map(len, classes))} classes: some ranks own none and only help")
    networks = (fresh_teacher(job, 0), fresh_teacher(job, 0))
    return job.condenser(classes, networks, read_teachers(job, teachers, networks[0]))
