"""What the programs of feature labels share: configuration, data, networks, and the set as it starts."""

from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from condenser.coresets import random_subset
from condenser.export import sha256
from condenser.feature_labels import FeatureConfig, Shape, feature_of, label_shape
from condenser.feature_student import PASS, StudentConfig
from condenser.loop import SetConfig
from condenser.synthetic_set import Note, SyntheticSet, checked, load_synthetic
from config import ConfigError, LocalPath, Section, named
from distill_feat.feat_names import RowName
from utils.augment import Augmenter, BatchAugmentConfig
from utils.ddp import World, kept_classes
from utils.image_networks import ImageNetwork, ImageNetworkConfig, NetType, image_network
from utils.run_folder import claim, log, short_hash
from utils.sampling import training_batch
from utils.stopping import StopFlag
from utils.streams import generator
from utils.teachers import PretrainConfig, load_bank, missing_members, train_bank
from utils.utils_image import ImageDatasetConfig, ImageSet, load_images

NORM_BATCHES = 16  # whose mean statistics batch norm gets


class FeatPretrainConfig(PretrainConfig, BatchAugmentConfig):
    """The teacher of the soft-label rows; feature labels start from networks trained likewise for feature.epochs."""


class FeatEvaluationConfig(StudentConfig):
    """Students and the rows that they are trained on."""

    rows: tuple[RowName, ...] = (
        "full", "distilled", "distilled_feature", "start", "start_feature", "random", "distilled_soft", "random_soft",
    )  # fmt: skip


class FeatConfig(Section):
    """What a run of any method with feature labels is asked; the method adds its own section, `condense`."""

    dataset: ImageDatasetConfig
    network: ImageNetworkConfig
    pretrain: FeatPretrainConfig
    feature: FeatureConfig | None = FeatureConfig()  # null: images alone
    condense: SetConfig
    evaluation: FeatEvaluationConfig
    seed: int = 0
    num_exp: int = Field(1, ge=1)  # sets to learn, from seed, seed + 1 ...
    generate_pretrained: bool = False  # only write the set as it starts
    tf32: bool = True
    debug: bool = False  # tracebacks, a log line an iteration, and only the first max(nclass // 100, 10) classes
    save_dir: LocalPath = Path("../results")
    pretrained_dir: LocalPath = Path("../pretrained_models")

    @model_validator(mode="after")
    def check(self) -> "FeatConfig":
        """Cross-section rules."""
        if self.evaluation.batch_invariant == "train" and self.network.norm_type == "batch":
            raise ValueError(
                "evaluation.batch_invariant: train, but network.norm_type: batch mixes the samples of a batch; set "
                "eval, or norm_type: instance"
            )
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the sets to learn."""
        return tuple(range(self.seed, self.seed + self.num_exp))


C = TypeVar("C", bound=FeatConfig, covariant=True)


class FeatJob(Generic[C]):
    """Data and networks of a run on this rank."""

    def __init__(self, cfg: C, world: World, flag: StopFlag) -> None:
        self.cfg, self.ipc, self.world, self.flag = cfg, cfg.condense.ipc, world, flag
        corpus = load_images(cfg.dataset)
        keep = cfg.dataset.load_memory
        self.train, self.val, self.test = (
            part.to(world.device) if keep else part for part in (corpus.train, corpus.val, corpus.test)
        )
        self.origin = {"images": corpus.fingerprint}
        self.kept = list(range(kept_classes(cfg.dataset.nclass, cfg.debug)))
        self.map_shape = self.map_shape_of(self.fresh(0, "shape"))  # (C, H, W) of the labelled maps

    def fresh(self, seed: int, purpose: str, *ids: int, kind: NetType | None = None) -> ImageNetwork:
        """A network with weights of the stream (seed, purpose, ids...), of the configured kind or another."""
        settings = self.cfg.network
        if kind:
            plain = kind in ("alexnet", "mlp", "lenet")
            settings = ImageNetworkConfig(net_type=kind, norm_type="none" if plain else "instance")
        return image_network(
            settings, self.train.channels, self.train.size, self.cfg.dataset.nclass, seed, purpose, *ids
        )

    @property
    def image_shape(self) -> Shape:
        """(C, H, W) of an image."""
        return self.train.channels, self.train.size, self.train.size

    def map_shape_of(self, net: ImageNetwork) -> Shape:
        """(C, H, W) of a network's maps at the labelled block. Raises ConfigError for a block that it has not."""
        layer = self.cfg.feature.layer_idx if self.cfg.feature else None
        with torch.no_grad():
            _, channels, height, width = net.eval().with_map(torch.zeros(2, *self.image_shape), layer)[1].shape
        return channels, height, width

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Of a feature label."""
        return label_shape(self.map_shape, self.cfg.feature.form) if self.cfg.feature else ()

    def trained(self, count: int, epochs: int) -> list[ImageNetwork]:
        """Networks trained on the real images, each rank its share; kept for other runs."""
        cfg, world = self.cfg, self.world
        settings = cfg.pretrain.model_copy(update={"epochs": max(epochs, 1)})
        values = named(cfg, ("dataset.", "network.", "pretrain.", "zca", "tf32")) | {"pretrain.epochs": epochs}
        values = {k: v for k, v in values.items() if k not in ("dataset.batch_real", "dataset.load_memory")}
        name = f"{cfg.network.net_type}_{short_hash(values)}"
        folder = Path(world.broadcast(str(cfg.pretrained_dir / cfg.dataset.dataset / "feature_networks" / name)))
        nets = [self.fresh(settings.seed, "feature network", i) for i in range(count)]
        if epochs:
            if world.main:
                claim(folder, {"images": self.origin["images"]}, "delete the folder")
            missing = world.broadcast(missing_members(folder, count, epochs))
            if missing:
                log.info(f"training {len(missing)} of {count} networks for {epochs} epochs into {folder}")
                augment = Augmenter(settings.aug_type, settings.cutmix, settings.mixup)
                train_bank(
                    folder, count, epochs, lambda i: self.fresh(settings.seed, "feature network", i), self.train,
                    augment, settings, False, world, self.flag,
                )  # fmt: skip
            bank = load_bank(folder, count, epochs, nets[0].to(world.device), world.device)
            for i, net in enumerate(nets):
                bank.interpolate(net.to(world.device), i, 0.0)
        for i, net in enumerate(nets):
            self.measure_statistics(net.to(world.device).requires_grad_(False), settings.batch_size, settings.seed, i)
        return [net.eval() for net in nets]

    def measure_statistics(self, net: ImageNetwork, batch: int, *name: int) -> None:
        """Give batch norm its statistics, the mean over real batches: saved networks are parameters only."""
        norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        for module in norms:
            module.momentum = None
        net.train()
        with torch.no_grad():
            for step in range(NORM_BATCHES if norms else 0):
                which = training_batch(self.train.lengths, batch, step, *name)
                net(self.train.input(which, self.world.device))

    def notes(self) -> dict[str, Note]:
        """What a learned set says of itself."""
        cfg, f = self.cfg, self.cfg.feature
        notes: dict[str, Note] = {"dataset": cfg.dataset.dataset, "ipc": self.ipc, "factor": 1, "decode_type": "single"}
        if f is None:
            return notes
        net = f"{cfg.network.net_type} depth {cfg.network.depth} width {cfg.network.width} {cfg.network.norm_type}"
        return notes | {
            "form": f.form, "pooling": f.pooling, "layer_idx": f.layer_idx or 0, "lbd": f.lbd,
            "use_feature": f.use_feature, "scope": f.scope, "net": net,
        }  # fmt: skip

    def start_values(self) -> dict[str, object]:
        """What makes a start what it is, besides its seed."""
        cfg, path = self.cfg, self.cfg.condense.load_path
        values = named(cfg, ("dataset.", "network.", "pretrain.", "feature", "zca", "debug"))
        values["load_path"] = str(path)
        if cfg.condense.init == "load" and path and path.is_file():
            values["loaded"] = sha256(path)
        return values

    def start(self, seed: int) -> SyntheticSet:
        """The set as it starts, from its artefact, which is made where it is not there."""
        cfg, world = self.cfg, self.world
        name = f"start_{cfg.condense.init}_seed{seed}_{short_hash(self.start_values())}"
        folder = Path(world.broadcast(str(cfg.pretrained_dir / cfg.dataset.dataset / f"ipc{self.ipc}" / name)))
        path = folder / "syn_data_0.pth"
        there = world.broadcast(path.exists())
        first = None if there else self.first_images(seed)
        if world.main:
            claim(folder, {"images": self.origin["images"]}, "delete the folder")
        if first is not None:
            assigned = cfg.feature if first.features is None else None
            networks = self.trained(assigned.n_feat, assigned.epochs) if assigned else []
            if world.main:
                self.with_labels(first, networks).save(path)
            world.barrier()
        log.info(f"start{'' if there else ' written'}: {path}")
        return load_synthetic(path)

    def first_images(self, seed: int) -> SyntheticSet:
        """Images that start a set: real ones, noise in the normaliser's units, or those of another set, with its labels
        where they are of the configured kind. Raises ConfigError where there are too few, or too many."""
        init, load_path = self.cfg.condense.init, self.cfg.condense.load_path
        nclass, norm = self.cfg.dataset.nclass, self.train.normaliser
        owner = torch.tensor(self.kept).repeat_interleave(self.ipc)
        if init == "load" and load_path:
            found = checked(load_synthetic(load_path), load_path, self.image_shape, nclass)
            if found.meta.get("factor", 1) != 1:
                raise ConfigError(f"{load_path}: factor {found.meta['factor']}, each image is several; take factor: 1")
            keep = torch.isin(found.owner, torch.tensor(self.kept)).nonzero().flatten()
            keep = keep[found.owner[keep].argsort(stable=True)]
            if found.owner[keep].tolist() != owner.tolist():
                counts = sorted(set(found.owner.bincount(minlength=nclass)[self.kept].tolist()))
                shown = " or ".join(map(str, counts))
                raise ConfigError(f"{load_path}: has {shown} images a class, condense.ipc is {self.ipc}: set it alike")
            labels = self.brought_labels(found, keep)
            return SyntheticSet(found.data[keep].float(), found.targets[keep], owner, None, self.notes(), labels, norm)
        if init == "noise":
            noise = torch.randn(len(owner), *self.image_shape, generator=generator(seed, "noise"))
            pixels = norm.inverse(noise)
        else:
            real = self.real(self.ipc, seed)
            if len(real) < len(owner):
                least = min(len(self.train.members()[c]) for c in self.kept)
                raise ConfigError(f"condense.ipc: {self.ipc}, but a class has {least} images to start from: lower it")
            pixels = real.pixels(torch.arange(len(real))).cpu()
        return SyntheticSet(pixels, torch.eye(nclass)[owner], owner, None, self.notes(), None, norm)

    def brought_labels(self, found: SyntheticSet, keep: Tensor) -> Tensor | None:
        """Feature labels [K, n, *form] of a loaded set's samples `keep` [n], or None where they are of another kind."""
        f, features, own = self.cfg.feature, found.features, self.notes()
        if f is None or features is None:
            return None
        if any(found.meta.get(key) != own[key] for key in ("form", "pooling", "layer_idx", "scope")) or (
            (len(features), *features.shape[2:]) != (f.n_feat, *self.label_shape)
        ):
            log.info("the loaded set's feature labels are of another kind: they are assigned anew")
            return None
        return features[:, keep if f.scope == "sample" else self.kept]

    def real(self, ipc: int, seed: int) -> ImageSet:
        """Random real images, `ipc` of every class (or all that there are), in class order."""
        members = [self.train.members()[c] for c in self.kept]
        which = random_subset(members, ipc, seed)
        return self.train.subset(which[self.train.labels[which].argsort(stable=True)])

    def with_labels(self, found: SyntheticSet, networks: list[ImageNetwork]) -> SyntheticSet:
        """The set with feature labels as assigned, phi(E_k(x)), a network each, or those it brings."""
        f = self.cfg.feature
        if f is None or found.features is not None:
            return found
        rows = []
        x = self.train.normaliser(found.data).to(self.world.device)
        for net in networks:
            with torch.no_grad():
                parts = [feature_of(net.with_map(part, f.layer_idx)[1], f.form, f.pooling) for part in x.split(PASS)]
            labels = torch.cat(parts).cpu()
            if f.scope == "class":
                labels = torch.stack([labels[found.owner == c].mean(0) for c in self.kept])
            rows.append(labels)
        return SyntheticSet(
            found.data, found.targets, found.owner, None, found.meta, torch.stack(rows), found.normaliser
        )
