"""The image modality of the programs: its configuration, data, networks and pictures."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator
from torch import Tensor, nn

from condense.job import OPTIONS as COMMON
from condense.job import Job, JobConfig
from condenser.Condenser_image import Condenser, ImageCondenseConfig
from condenser.evaluator import EvaluationConfig, StudentScore, TrainingSet
from condenser.synthetic_image import image_grid, samples_per_image, student_view
from condenser.synthetic_set import SyntheticSet, checked, load_synthetic
from config import ConfigError, Option
from utils.augment import Augmenter, BatchAugmentConfig
from utils.ddp import World
from utils.image_networks import ImageNetworkConfig, NetType, image_network
from utils.report import Block, Heading, Picture
from utils.teachers import PretrainConfig, TeacherBank
from utils.utils_image import ImageCorpus, ImageDatasetConfig, load_images

OPTIONS = (*COMMON, Option("aug_type", "condense.aug_type", "value", "augmentation of both sides of the matching"))


class ImagePretrainConfig(PretrainConfig, BatchAugmentConfig):
    """How image teachers are trained."""


class ImageEvaluationConfig(EvaluationConfig, BatchAugmentConfig):
    """Students of images, the same for all rows."""

    architectures: tuple[NetType, ...] = ()  # further students, beside those of network.net_type

    @model_validator(mode="after")
    def check_rows(self) -> "ImageEvaluationConfig":
        """Rows that are of text only."""
        wrong = [row for row in self.rows if row.startswith("tfidf")]
        if wrong:
            raise ValueError(f"rows: {wrong[0]} is a row of text; leave it out")
        return self


class ImageConfig(JobConfig):
    """An image run."""

    dataset: ImageDatasetConfig
    network: ImageNetworkConfig
    pretrain: ImagePretrainConfig
    condense: ImageCondenseConfig
    evaluation: ImageEvaluationConfig

    @property
    def multilabel(self) -> bool:
        """An image has one class."""
        return False

    @property
    def net_name(self) -> str:
        """Kind of the network."""
        return self.network.net_type


class ImageJob(Job):
    """Images and networks of a run, on this rank."""

    cfg: ImageConfig
    program = "condense_script.py"
    unit = "uint8 pixels"

    def __init__(self, cfg: ImageConfig, world: World, corpus: ImageCorpus) -> None:
        self.cfg, self.world, self.classes = cfg, world, corpus.classes
        keep = cfg.dataset.load_memory
        self.images, self.val, self.test = (
            part.to(world.device) if keep else part for part in (corpus.train, corpus.val, corpus.test)
        )
        self.train = self.images
        self.origin = {"images": corpus.fingerprint}

    def fresh(self, seed: int, purpose: str, *ids: int) -> nn.Module:
        """A fresh network of the configured kind."""
        return self.network(self.cfg.network, seed, purpose, *ids)

    def network(self, settings: ImageNetworkConfig, seed: int, purpose: str, *ids: int) -> nn.Module:
        """A fresh network for these images."""
        return image_network(settings, self.images.channels, self.images.size, self.cfg.nclass, seed, purpose, *ids)

    def student(self, network: str, seed: int, purpose: str, *ids: int) -> nn.Module:
        """A fresh student of the configured kind or of another architecture."""
        if not network:
            return self.fresh(seed, purpose, *ids)
        kind = {"net_type": network, "norm_type": "none" if network in ("alexnet", "mlp", "lenet") else "instance"}
        return self.network(ImageNetworkConfig.model_validate(kind), seed, purpose, *ids)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Kinds of students: the configured network, then the others."""
        return ("", *self.cfg.evaluation.architectures)

    def augmenter(self, teachers: bool) -> Augmenter | None:
        """What teachers or students do to their batches."""
        settings = self.cfg.pretrain if teachers else self.cfg.evaluation
        return Augmenter(settings.aug_type, settings.cutmix, settings.mixup)

    def class_costs(self) -> list[float]:
        """Images of every class."""
        return class_costs(self.cfg)

    def condenser(
        self, classes: Sequence[Sequence[int]], networks: tuple[nn.Module, nn.Module], bank: TeacherBank
    ) -> Condenser:
        """The condenser of this rank's classes."""
        cfg = self.cfg
        return Condenser(
            nclass_list=classes, device=self.world.device, settings=cfg.condense, images=self.images, networks=networks,
            bank=bank, batch_real=cfg.dataset.batch_real, seed=cfg.seed, world=self.world, dataset=cfg.data_name,
        )  # fmt: skip

    def parts(self, data: TrainingSet) -> list[list[int]]:
        """Images in passes of the budget."""
        budget = self.cfg.condense.image_budget
        return [list(range(i, min(i + budget, len(data)))) for i in range(0, len(data), budget)]

    def student_view(self, found: SyntheticSet, path: Path) -> TrainingSet:
        """Decoded, normalised images."""
        shape = (self.images.channels, self.images.size, self.images.size)
        return student_view(checked(found, path, shape, self.cfg.nclass), self.images.normaliser)

    def pictures(self, found: SyntheticSet, run: Path, folder: Path) -> list[Block]:
        """The images before and after, a row a class."""
        blocks: list[Block] = [Heading("Synthetic images, a row a class")]
        start = load_synthetic(run / "distilled_data" / "syn_data_0.pth")
        for name, part in (("before", start), ("after", found)):
            image_grid(part, folder / f"images_{name}.png")
            blocks.append(Picture(folder / f"images_{name}.png", f"{name} the condensation"))
        return blocks

    def linear(self, which: Tensor) -> StudentScore:
        """Text has such a row."""
        raise ConfigError("evaluation.rows: images have no linear row")


def class_costs(cfg: ImageConfig) -> list[float]:
    """Images per iteration and class: samples forward and backward for both losses, real images over refresh."""
    c = cfg.condense
    synthetic = 3.0 * c.ipc * samples_per_image(c.factor, c.decode_type) * (1 + c.iter_calib)
    return [synthetic + 0.1 * cfg.dataset.batch_real / c.refresh] * cfg.nclass


def open_images(cfg: ImageConfig, world: World) -> ImageJob:
    """Read the data."""
    return ImageJob(cfg, world, load_images(cfg.dataset))
