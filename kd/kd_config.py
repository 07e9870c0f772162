"""The requirement's YAML keys as checked settings, and what follows from them: loss and schedule."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from config import ConfigError, LocalPath, Option, Section
from config.schema import nearest
from kd.losses import Base, Compat, LossConfig
from kd.methods.chains import Assistants, Dlb
from kd.methods.condensation import Kcd
from kd.methods.contrast import Bingo, Crd
from kd.methods.hints import At, FitNet, Nst, Review, Vid
from kd.methods.relations import Dist, Ickd, Pkt, Rkd, Sp
from kd.methods.rotations import Hsakd
from kd.methods.temperature import Ctkd
from kd.methods.transformer import Tat
from kd.regions import parse_scales
from utils.kd_networks import known_network

Views = Literal["plain", "turned", "bags", "twice"]
METHODS = (
    "NONE", "KD", "DKD", "NKD", "SDD_KD", "SDD_DKD", "SDD_NKD",
    "KD_LSKD", "DKD_LSKD", "NKD_LSKD", "SDD_KD_LSKD", "SDD_DKD_LSKD", "SDD_NKD_LSKD",
)  # fmt: skip
# Terms that stand alone or beside one of the above, as in KD+CRD; and their settings' place.
TERMS = (
    "AT", "CRD", "DIST", "DLB", "FITNET", "ICKD", "NST", "PKT", "REVIEWKD", "RKD", "SP", "TAT", "VID",
    "BINGO", "HSAKD", "HSAKD_TEACHER",
)  # fmt: skip
ALONE = ("NONE", "BINGO", "HSAKD", "HSAKD_TEACHER")
# What stands beside a method, and how.
BESIDE = {
    "CTKD": "set any key of it, as in CTKD.START=4, or CTKD={}",
    "KCD": "set any key of it, as in KCD.PERIOD=10, or KCD={}",
    "TAKD": "set ASSISTANTS.NETWORKS=[NAME] ASSISTANTS.DENSE=false",
    "DGKD": "set ASSISTANTS.NETWORKS=[NAME]",
    "ASSISTANTS": "set ASSISTANTS.NETWORKS=[NAME]",
}
UNTAUGHT = ("NONE", "DLB", "HSAKD_TEACHER")  # without a teacher
VIEWS: dict[str, Views] = {"DLB": "twice", "HSAKD": "turned", "HSAKD_TEACHER": "turned", "BINGO": "bags"}
BASES: dict[str, Base] = {"NONE": "kd", "KD": "kd", "DKD": "dkd", "NKD": "nkd"}
QUICK_EPOCHS = 5
OPTIONS = (
    Option("M", "M", "value", 'scales of regions, as in "[1,2,4]"; [1] is the whole image alone'),
    Option("quick", "QUICK", "flag", "5 epochs, decay stages and warm-ups scaled"),
    Option("seed", "SEED", "value", "seed of weights, order and views"),
)
# What runs side by side have in common.
SHARED = ("DATASET.", "SOLVER.BATCH_SIZE", "SOLVER.CHANNELS_LAST", "KD.CACHE_VIEWS", "SEED", "tf32")
OF_TEACHER = ("DISTILLER.TEACHER", "KD.TEACHER_DTYPE")


class Experiment(Section):
    """Names of a run."""

    PROJECT: str = "kd"
    NAME: str = ""  # "": made of method and networks
    TAG: str = ""
    SAVE_AS_TEACHER: bool = False  # TYPE NONE: keep the network where students look for their teacher


class TestPart(Section):
    """How the test images are read."""

    BATCH_SIZE: int = Field(64, ge=1)


class Dataset(Section):
    """Which images; sizes in pixels, None = the data set's own."""

    TYPE: str = "cifar100"  # a known data set, or a name of yours for a folder with train/ and val/
    ROOT: LocalPath = Path("data")
    SIZE: int | None = Field(None, ge=8)  # of the networks' input
    LOAD_SIZE: int | None = Field(None, ge=8)  # of the images that crops are taken from
    PAD: int | None = Field(None, ge=0)
    FLIP: bool = True
    AUGMENT: Literal["crop", "resized_crop"] | None = None  # None: resized_crop for imagenet, else crop
    PER_CLASS: int | None = Field(None, ge=1)  # the first training images of a class only
    VAL_FRACTION: float = Field(0.0, ge=0, lt=0.5)  # of train, held out to fit a temperature; 0 = none
    VAL_REST: bool = False  # hold out what PER_CLASS leaves, to choose settings on
    DROP_LAST: bool = False  # the smaller last batch of an epoch
    IN_MEMORY: bool = True  # false: files are decoded for every batch
    NUM_WORKERS: int = Field(2, ge=0)  # read from their files; 8 threads decode
    TEST: TestPart = TestPart()

    @model_validator(mode="after")
    def check(self) -> "Dataset":
        """Resized crops are cut from files; one part is held out."""
        if self.resized and self.IN_MEMORY:
            raise ValueError("IN_MEMORY: true, but resized crops are cut from the files; set IN_MEMORY: false")
        if self.VAL_REST and (not self.PER_CLASS or self.VAL_FRACTION):
            raise ValueError("VAL_REST: true holds out what PER_CLASS leaves; set PER_CLASS, and VAL_FRACTION: 0")
        return self

    @property
    def resized(self) -> bool:
        """Whether crops have any size and shape."""
        return (self.AUGMENT or {"imagenet": "resized_crop"}.get(self.TYPE)) == "resized_crop"


class Distiller(Section):
    """Method and networks."""

    TYPE: str = "SDD_KD_LSKD"  # one of METHODS, or of TERMS, or several joined by +
    TEACHER: str | None = None
    STUDENT: str
    TEACHER_PATH: LocalPath | None = None  # a file; None: looked for below TEACHERS
    TEACHERS: LocalPath = Path("save")

    @field_validator("TEACHER", "STUDENT")
    @classmethod
    def networks(cls, value: str | None) -> str | None:
        """Networks that exist."""
        return value and known_network(value)

    @field_validator("TYPE")
    @classmethod
    def known(cls, value: str) -> str:
        """Methods that exist, and that can be added up."""
        parts = value.split("+")
        for part in parts:
            if part in BESIDE:
                raise ValueError(f"{part} is no TYPE but stands beside one: {BESIDE[part]}")
            if part not in METHODS + TERMS:
                raise ValueError(f"no method '{part}'{nearest(part, METHODS + TERMS)}")
        several = len(parts) > 1
        if len({*parts}) < len(parts) or sum(part in METHODS for part in parts) > 1 or several and {*parts} & {*ALONE}:
            raise ValueError(
                f"{value} cannot be added up: take different ones, of {', '.join(METHODS[1:])} at most one, and "
                f"{', '.join(ALONE)} alone, whose losses are whole and whose batches are their own"
            )
        return value

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods that are added up."""
        return tuple(self.TYPE.split("+"))

    @property
    def logit_method(self) -> str:
        """The one of METHODS among them; NONE: there is none."""
        return next((part for part in self.parts if part in METHODS), "NONE")


class Solver(Section):
    """SGD with step decay; batch sizes are of all ranks together."""

    TRAINER: Literal["base"] = "base"
    TYPE: Literal["SGD"] = "SGD"
    BATCH_SIZE: int = Field(64, ge=1)
    EPOCHS: int = Field(240, ge=1)
    LR: float = Field(0.05, gt=0)
    LR_DECAY_STAGES: tuple[float, ...] = (150, 180, 210)
    LR_DECAY_RATE: float = Field(0.1, gt=0)
    WEIGHT_DECAY: float = Field(5e-4, ge=0)
    MOMENTUM: float = Field(0.9, ge=0, lt=1)
    AMP: bool = False  # bfloat16 in the student's convolutions; losses stay float32
    SYNC_BN: bool = False  # batch norm over all ranks
    CHANNELS_LAST: bool = True  # the student's maps; the teacher's always are


class KdWeights(Section):
    """Weights of the two parts."""

    CE_WEIGHT: float = Field(0.1, ge=0)
    KD_WEIGHT: float = Field(0.9, ge=0)


class Kd(Section):
    """Hinton's loss, and how the teacher runs."""

    TEMPERATURE: float = Field(4.0, gt=0)
    LOSS: KdWeights = KdWeights()
    WARMUP: int = Field(0, ge=0)  # epochs in which the weight of the loss rises
    TEACHER_DTYPE: Literal["float32", "bfloat16"] = "float32"
    CACHE_VIEWS: int = Field(0, ge=0)  # n: epochs repeat n fixed views, whose teacher logits are kept (float16)


class Dkd(Section):
    """Decoupled loss (Zhao et al. 2022)."""

    CE_WEIGHT: float = Field(1.0, ge=0)
    ALPHA: float = Field(1.0, ge=0)
    BETA: float = Field(8.0, ge=0)
    T: float = Field(4.0, gt=0)
    WARMUP: int = Field(20, ge=0)


class Nkd(Section):
    """Normalised loss (Yang et al. 2023)."""

    CE_WEIGHT: float = Field(1.0, ge=0)
    GAMMA: float = Field(1.5, ge=0)
    T: float = Field(1.0, gt=0)
    WARMUP: int = Field(0, ge=0)


class Sdd(Section):
    """Weights of regions."""

    WEIGHT_RULE: Literal["none", "correctness", "class"] = "correctness"
    COMPLEMENT_WEIGHT: float = Field(2.0, ge=0)
    REDUCTION: Literal["mean", "sum", "group_mean"] = "mean"
    BINS: Literal["exact", "adaptive"] = "exact"


class Lskd(Section):
    """Standardised logits."""

    DEVIATION: Literal["sample", "population"] = "sample"


class Log(Section):
    """Where a run goes, and how often a student is kept besides."""

    PREFIX: LocalPath = Path("results/kd")
    SAVE_CHECKPOINT_FREQ: int = Field(40, ge=0)  # epochs; 0 = never
    TENSORBOARD_FREQ: int = 500  # read from their files; TensorBoard gets every epoch


class KdConfig(Section):
    """A run of `kd/train.py`."""

    EXPERIMENT: Experiment = Experiment()
    DATASET: Dataset = Dataset()
    DISTILLER: Distiller
    SOLVER: Solver = Solver()
    KD: Kd = Kd()
    DKD: Dkd = Dkd()
    NKD: Nkd = Nkd()
    SDD: Sdd = Sdd()
    LSKD: Lskd = Lskd()
    AT: At = At()
    CRD: Crd = Crd()
    DIST: Dist = Dist()
    DLB: Dlb = Dlb()
    FITNET: FitNet = FitNet()
    ICKD: Ickd = Ickd()
    NST: Nst = Nst()
    PKT: Pkt = Pkt()
    REVIEWKD: Review = Review()
    RKD: Rkd = Rkd()
    SP: Sp = Sp()
    TAT: Tat = Tat()
    VID: Vid = Vid()
    BINGO: Bingo = Bingo()
    HSAKD: Hsakd = Hsakd()
    CTKD: Ctkd | None = None  # a temperature that is learned, of any method that has one
    KCD: Kcd | None = None  # a training set that shrinks, for any method
    ASSISTANTS: Assistants = Assistants()  # networks between teacher and student, for any method with a teacher
    LOG: Log = Log()
    M: tuple[int, ...] = (1, 2, 4)
    COMPAT: Compat | None = None  # a public variant of the loss, bugs included
    SEED: int = 0
    QUICK: bool = False  # 5 epochs, stages and warm-ups scaled
    tf32: bool = True
    debug: bool = False

    @field_validator("M", mode="before")
    @classmethod
    def scales(cls, value: object) -> object:
        """`[1,2]`, `[1, 2]`, `1,2` or a list."""
        try:
            return parse_scales(list(value) if isinstance(value, tuple) else str(value))
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("M: ")) from error

    @model_validator(mode="after")
    def check(self) -> "KdConfig":
        """A student needs a teacher; what is combined goes together."""
        d, views = self.DISTILLER, [VIEWS[part] for part in self.DISTILLER.parts if part in VIEWS]
        if self.distils and d.TEACHER is None:
            raise ValueError(f"DISTILLER.TYPE: {d.TYPE} needs DISTILLER.TEACHER; name a network, or set TYPE: NONE")
        if self.CTKD and d.logit_method == "NONE":
            other = "" if {*d.parts} & {*ALONE} else "add KD, or "
            raise ValueError(f"CTKD: no temperature of {d.TYPE} can be learned; {other}leave CTKD out")
        if self.KCD and "BINGO" in d.parts:
            raise ValueError("KCD: it ranks images by logits, and BINGO learns none; leave KCD out")
        if self.ASSISTANTS.NETWORKS and not self.distils:
            raise ValueError(f"ASSISTANTS: {d.TYPE} has no teacher, so there is nothing between; leave NETWORKS empty")
        if self.ASSISTANTS.NETWORKS and "HSAKD" in d.parts:
            raise ValueError("ASSISTANTS: HSAKD reads heads that only its teacher has; leave NETWORKS empty")
        if "BINGO" in d.parts and self.BINGO.QUEUE < self.SOLVER.BATCH_SIZE:
            raise ValueError(
                f"BINGO.QUEUE: {self.BINGO.QUEUE} keys, but a batch has {self.SOLVER.BATCH_SIZE}; raise it to that"
            )
        kept_alone = views or self.KCD or self.ASSISTANTS.NETWORKS or {*d.parts} - {*METHODS, "DIST"}
        if self.KD.CACHE_VIEWS and kept_alone:
            raise ValueError(
                f"KD.CACHE_VIEWS: {self.KD.CACHE_VIEWS}, but only logits of one teacher on fixed images are kept, for "
                "methods of logits alone; set 0"
            )
        try:
            self.loss  # noqa: B018 - a loss that cannot be is said here
        except ValidationError as error:
            raise ValueError("COMPAT: " + str(error.errors()[0]["ctx"]["error"])) from error
        return self

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return not {*self.DISTILLER.parts} <= {*UNTAUGHT}

    @property
    def views(self) -> Views:
        """What the method needs of a batch."""
        return next((VIEWS[part] for part in self.DISTILLER.parts if part in VIEWS), "plain")

    @property
    def apart(self) -> bool:
        """Whether the run cannot share batches and teacher with others."""
        return self.views != "plain" or self.KCD is not None or bool(self.ASSISTANTS.NETWORKS)

    @property
    def base_loss(self) -> Base:
        """Of the method."""
        return BASES[self.DISTILLER.logit_method.removeprefix("SDD_").removesuffix("_LSKD")]

    @property
    def standardise(self) -> bool:
        """Whether logits are standardised."""
        return self.DISTILLER.logit_method.endswith("_LSKD")

    @property
    def regions(self) -> tuple[int, ...]:
        """Scales of the method: M with SDD, else the whole image."""
        return self.M if self.DISTILLER.logit_method.startswith("SDD_") else (1,)

    @property
    def loss(self) -> LossConfig:
        """Of the core of all methods."""
        kind = self.base_loss
        temperature = {"kd": self.KD.TEMPERATURE, "dkd": self.DKD.T, "nkd": self.NKD.T}[kind]
        return LossConfig(
            base=kind, temperature=temperature, standardise=self.standardise, deviation=self.LSKD.DEVIATION,
            alpha=self.DKD.ALPHA, beta=self.DKD.BETA, gamma=self.NKD.GAMMA,
            weight_rule=self.SDD.WEIGHT_RULE if len(self.regions) > 1 else "none",
            complement_weight=self.SDD.COMPLEMENT_WEIGHT, reduction=self.SDD.REDUCTION, compat=self.COMPAT,
        )  # fmt: skip

    @property
    def weights(self) -> tuple[float, float]:
        """Of the cross-entropy and of the loss of logits."""
        if self.DISTILLER.logit_method == "NONE":
            return float(self.DISTILLER.TYPE != "BINGO"), 0.0
        if self.base_loss == "kd":
            return self.KD.LOSS.CE_WEIGHT, self.KD.LOSS.KD_WEIGHT
        return (self.DKD if self.base_loss == "dkd" else self.NKD).CE_WEIGHT, 1.0

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return QUICK_EPOCHS if self.QUICK else self.SOLVER.EPOCHS

    @property
    def share_of_epochs(self) -> float:
        """Of the schedule: less than 1 in a quick run."""
        return self.epochs / self.SOLVER.EPOCHS

    def rate(self, epoch: int) -> float:
        """Learning rate of epoch 1, 2, ...: decayed after every stage."""
        stages = [stage * self.share_of_epochs for stage in self.SOLVER.LR_DECAY_STAGES]
        return self.SOLVER.LR * self.SOLVER.LR_DECAY_RATE ** sum(epoch > stage for stage in stages)

    @property
    def warmup(self) -> float:
        """Epochs in which the weight of the loss of logits rises."""
        return {"kd": self.KD.WARMUP, "dkd": self.DKD.WARMUP, "nkd": self.NKD.WARMUP}[self.base_loss]
