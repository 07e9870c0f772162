"""What a comparison of condensation methods is made of: its manifest, the sets to learn, the rows of its table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from condense.image_job import ImageConfig
from condense.job import condense_folder
from condenser.feature_labels import FeatureConfig, fair_ipc, label_shape
from condenser.feature_student import StudentConfig
from condenser.trajectory_condenser import TrajectoryConfig
from config import LocalPath, Section, add_args_from_yaml
from distill_feat.dc import DC, DcConfig
from distill_feat.feat_job import FeatConfig
from distill_feat.trajectory_job import TrajectoryRunConfig, method
from utils.checkpoint import load_json
from utils.image_networks import image_network
from utils.run_folder import REPOSITORY, RESULT

REAL = ("random", "herding", "k-center")
FIXED = ("full", "herding", "k-center")  # no seed changes them
LAUNCH = "launch.json"  # in a run folder: what its process took


class Kind(NamedTuple):
    """A program that learns sets: its file, its settings, and the folder of what it learns."""

    script: str
    schema: type[ImageConfig] | type[FeatConfig]
    folder: Callable[[Any], Path]


KINDS = {
    "ncfm": Kind("condense/condense_script.py", ImageConfig, condense_folder),
    "dc": Kind("distill_feat/dc.py", DcConfig, lambda cfg: DC.learn_folder(cfg, cfg.seed)),
    "mtt": Kind("distill_feat/mtt.py", TrajectoryRunConfig, lambda cfg: method("mtt").learn_folder(cfg, cfg.seed)),
    "datm": Kind("distill_feat/datm.py", TrajectoryRunConfig, lambda cfg: method("datm").learn_folder(cfg, cfg.seed)),
}


class MethodConfig(Section):
    """A method that learns sets, at every scale that it has a configuration for."""

    program: Literal["ncfm", "dc", "mtt", "datm"]
    configs: dict[int, LocalPath]  # by scale
    overrides: tuple[str, ...] = ()


class Preparation(Section):
    """A program that others need, for teachers or experts."""

    script: str
    config: LocalPath


class CompareConfig(Section):
    """What is compared, and by which students."""

    judge: LocalPath  # a configuration of condense/: data, network of students, teachers of features and soft labels
    scales: tuple[int, ...] = Field(min_length=1)  # images a class, or the bytes of so many
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)  # of sets
    students: StudentConfig  # of every row; `repeat` of every set
    overrides: tuple[str, ...] = ()  # of every program
    prepare: tuple[Preparation, ...] = ()
    methods: dict[str, MethodConfig]
    quick: bool = False
    data_dir: LocalPath | None = None

    @property
    def shared(self) -> tuple[str, ...]:
        """Overrides of every program."""
        return (*self.overrides, *([f"dataset.data_dir={self.data_dir}"] if self.data_dir else []))

    @property
    def taken(self) -> tuple[int, ...]:
        """The seeds that are taken."""
        return self.seeds[:1] if self.quick else self.seeds


@dataclass(frozen=True)
class Run:
    """A set that a program learns."""

    words: tuple[str, ...]  # of its command line
    folder: Path
    cfg: ImageConfig | FeatConfig

    @property
    def finished(self) -> bool:
        """Whether its set is there."""
        return (self.folder / RESULT).exists()

    @property
    def cost(self) -> dict[str, float]:
        """`iteration_s`, seconds of one (not of an interrupted run), and `peak` MiB (not of one started by hand)."""
        niter, found = self.cfg.condense.niter, dict[str, float]()
        first, last = (self.folder / "distilled_data" / f"syn_data_{i}.pth" for i in (0, niter))
        if niter and last.exists() and "resumed at iteration" not in (self.folder / "print.log").read_text():
            found["iteration_s"] = (last.stat().st_mtime - first.stat().st_mtime) / niter
        launched = self.folder / LAUNCH
        return found | (load_json(launched) if launched.exists() else {})


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    method: str
    scale: int  # 0: the full data
    images: int  # a class
    equal: Literal["images", "bytes", "both"] = "both"  # what it has as many of as the others of its scale
    runs: tuple[Run, ...] = ()  # of every seed; of real images none

    @property
    def key(self) -> str:
        """Under which its numbers are kept."""
        return f"{self.method}_{self.scale}_{self.images}" if self.scale else self.method

    @property
    def feature(self) -> FeatureConfig | None:
        """What its feature labels are."""
        return feature_of(self.runs[0].cfg) if self.runs else None


def feature_of(cfg: ImageConfig | FeatConfig) -> FeatureConfig | None:
    """What a run's feature labels are."""
    return cfg.feature if isinstance(cfg, FeatConfig) else None


def fair_images(cfg: ImageConfig | FeatConfig, scale: int) -> int:
    """Images a class that, with their soft and feature labels, take no more bytes than `scale` images; 0 if none."""
    d, f = cfg.dataset, feature_of(cfg)
    soft = d.nclass if isinstance(cfg.condense, TrajectoryConfig) and cfg.condense.soft_labels else 0
    shape = (d.channels, d.size, d.size)
    if f is None:
        return fair_ipc(scale, shape, (), 0, "sample", soft)
    with torch.no_grad():
        net = image_network(cfg.network, d.channels, d.size, d.nclass, 0, "shape")
        _, *found = net.with_map(torch.zeros(1, *shape), f.layer_idx)[1].shape
    return fair_ipc(scale, shape, label_shape((found[0], found[1], found[2]), f.form), f.n_feat, f.scope, soft)


def planned(m: CompareConfig, name: str, scale: int, images: int, seed: int) -> Run:
    """A method's run. Raises ConfigError."""
    own = m.methods[name]
    kind, path = KINDS[own.program], own.configs[scale]
    words = (*m.shared, *own.overrides, f"condense.ipc={images}", f"seed={seed}")
    if own.program != "ncfm":  # it judges what it has learned in a table of its own, here by one student
        words = (*words, "num_exp=1", "evaluation.rows=[distilled]", "evaluation.repeat=1")
    script = REPOSITORY / kind.script
    cfg: Any = add_args_from_yaml(kind.schema, path, words, script.parent).config
    return Run((str(script), f"--config_path={path}", *words), kind.folder(cfg), cfg)


def lines_of(m: CompareConfig) -> list[Line]:
    """The rows: at every scale subsets, and methods with as many images and, where that differs, in as many bytes."""
    lines = [Line("full", 0, 0)]
    for scale in m.scales:
        lines += [Line(name, scale, scale) for name in REAL]
        for name in (name for name, own in m.methods.items() if scale in own.configs):
            cfg = planned(m, name, scale, scale, m.taken[0]).cfg
            fair = fair_images(cfg, scale)
            each: dict[int, Literal["images", "bytes", "both"]] = {scale: "both" if fair == scale else "images"}
            if 0 < fair < scale:
                each[fair] = "bytes"
            for images, equal in each.items() if not (m.quick and feature_of(cfg)) else ():
                runs = tuple(planned(m, name, scale, images, seed) for seed in m.taken)
                lines.append(Line(name, scale, images, equal, runs))
    return lines
