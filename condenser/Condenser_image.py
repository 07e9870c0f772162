"""Condensation of images: pixels, decoded into samples and augmented like the real images that they are matched to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from condenser.compute_loss_image import compute_calib_loss, compute_match_loss
from condenser.matching import ClassCondenser, MatchConfig, Start
from condenser.synthetic_image import DecodeType, check_decoding, decode, initial_class, samples_per_image
from condenser.synthetic_set import SyntheticSet, checked, load_synthetic
from config import ConfigError
from NCFM.cf_loss import real_embedding
from utils.augment import AugType, draw_augmentation
from utils.ddp import World
from utils.streams import generator
from utils.teachers import TeacherBank
from utils.utils_image import ImageSet
from utils.winograd import follow, with_winograd

CACHED_FLOATS = 2**21  # a thread, of the largest map in a compiled pass on a CPU: maps that stay in its cache


class ImageCondenseConfig(MatchConfig):
    """What is learned, against what; the part that is images."""

    factor: int = Field(2, ge=1)  # tiles a side of a stored image
    decode_type: DecodeType = "single"
    aug_type: AugType = "color_crop_cutout"  # of real and synthetic images alike
    image_budget: int = Field(512, ge=1)  # images of one forward pass
    real_precision: Literal["float32", "bfloat16"] = "float32"  # of the real images' forward pass
    compile: bool = False  # torch.compile, and on a CPU Winograd's convolution for real images in float32


class Condenser(ClassCondenser):
    """Images of this rank's classes, as pixels between 0 and 1."""

    settings: ImageCondenseConfig

    def __init__(
        self,
        *,
        nclass_list: Sequence[Sequence[int]],
        device: torch.device | str,
        settings: ImageCondenseConfig,
        images: ImageSet,
        networks: tuple[nn.Module, nn.Module],
        bank: TeacherBank,
        batch_real: int,
        seed: int,
        world: World,
        dataset: str,
    ) -> None:
        """`images`: the real ones; the rest as in ClassCondenser."""
        check_decoding(images.size, settings.factor, settings.decode_type)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in networks[0].modules()):
            raise ConfigError(
                "network.norm_type: batch: its statistics would mix the classes of a pass; condense with instance, "
                "group, layer or none, and judge with batch"
            )
        self.images, self.dataset = images, dataset
        head: Any = networks[0].get_submodule("head")
        super().__init__(
            nclass_list=nclass_list, device=device, settings=settings, samples=images, networks=networks, bank=bank,
            layers=1, width=head.in_features, batch_real=batch_real, seed=seed, world=world,
        )  # fmt: skip
        quick = settings.compile and self.device.type == "cpu" and settings.real_precision == "float32"
        self.real_network: nn.Module = with_winograd(self.model_interval) if quick else self.model_interval
        passes: list[Any] = [self.model_interval, self.model_final, self.real_network]
        if settings.compile:
            passes = [torch.compile(net, dynamic=False) for net in passes]
        self.match_pass, self.calib_pass, self.real_pass = passes
        self.embedding = torch.compile(real_embedding) if settings.compile else real_embedding
        self.match_view = self.calib_view = draw_augmentation("none", 1, generator(seed, "no view"))

    @property
    def scale(self) -> float:
        """Deviation of the pixels: the unit of a relative learning rate."""
        return float(self.images.normaliser.std.mean())

    def start(self) -> Start:
        """This rank's initial pixels [n, C, H, W] and targets [n, classes]."""
        s, images = self.settings, self.images
        shape = (images.channels, images.size, images.size)
        if not self.classes:
            return torch.zeros(0, *shape), None, torch.zeros(0, self.nclass)
        if s.init == "load" and s.load_path:
            return self.load_condensed_data(s.load_path, shape)
        kind: Any = s.init
        data = [
            initial_class(kind, images, self.sampler.members[c], s.ipc, s.factor, generator(self.seed, "init", c))
            for c in self.classes
        ]
        targets = torch.eye(self.nclass)[self.classes].repeat_interleave(s.ipc, 0)
        return torch.cat(data), None, targets

    def load_condensed_data(self, path: Path, shape: tuple[int, ...]) -> Start:
        """This rank's rows of a saved set. Raises ConfigError where they do not fit."""
        found = checked(load_synthetic(path), path, shape, self.nclass)
        which = self.loaded_rows(found.owner, path)
        return found.data[which].float(), None, found.targets[which]

    def prepare(self, iteration: int) -> None:
        """As in ClassCondenser, with pixels put back between 0 and 1 and a view for the calibration."""
        with torch.no_grad():
            self.data.clamp_(0, 1)
        self.calib_view = draw_augmentation(
            self.settings.aug_type, 1, generator(self.seed, "calibration view", iteration)
        )
        super().prepare(iteration)

    def draw_state(self, key: int) -> None:
        """Teacher state and augmentation number `key`: real and synthetic images meet the same numbers."""
        super().draw_state(key)
        follow(self.real_network)
        self.match_view = draw_augmentation(self.settings.aug_type, 1, generator(self.seed, "view", key))

    def real_features(self, samples: Tensor) -> Tensor:
        """Features [1, U, D] of augmented images [U], computed in passes that the ranks share out."""
        features = self.data.new_zeros(1, len(samples), self.feature_shape[2])
        parts = torch.arange(len(samples)).split(self.settings.image_budget)
        half = self.settings.real_precision == "bfloat16"
        for i in self.world.share([float(len(part)) for part in parts]):
            x = self.match_view(self.images.input(samples[parts[i]], self.device).to(features.dtype))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                features[:, parts[i]] = self.in_small_passes(x).to(features.dtype)
        return self.world.sum(features) if self.world.size > 1 else features

    def in_small_passes(self, x: Tensor) -> Tensor:
        """Features [1, B, D] of images [B, C, H, W]; compiled for a CPU in passes whose maps stay in its cache."""
        if not self.settings.compile:
            return self.real_pass(x).features
        width = max((p.shape[0] for p in self.real_network.parameters() if p.ndim == 4), default=1)
        floats = CACHED_FLOATS * torch.get_num_threads() * (2 if self.settings.real_precision == "bfloat16" else 1)
        small = max(1, floats // (width * x.shape[-1] ** 2))
        size = small if self.device.type == "cpu" else self.settings.image_budget
        padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % size))
        return torch.cat([self.real_pass(part).features for part in padded.split(size)], 1)[:, : len(x)]

    def embed_real(self, features: Tensor, t: Tensor) -> Tensor:
        """As in ClassCondenser, in the real side's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.real_precision == "bfloat16"):
            return self.embedding(features, t, self.loss_func).to(features.dtype)

    @property
    def samples_per_row(self) -> int:
        """Training samples of one stored image."""
        return samples_per_image(self.settings.factor, self.settings.decode_type)

    @property
    def tile_size(self) -> int:
        """Classes in one forward pass, within the image budget."""
        return self.even_tiles(self.settings.image_budget // (self.settings.ipc * self.samples_per_row))

    def as_input(self, rows: Tensor, where: slice) -> Tensor:
        """Decoded, normalised images [n * samples, C, H, W]."""
        return self.images.normaliser(decode(rows, self.settings.factor, self.settings.decode_type))

    def match_losses(self, x: Tensor, real: Tensor, t: Tensor) -> Tensor:
        """Matching loss [K] of the images in the view of the real ones."""
        x = self.match_view(x)
        return compute_match_loss(self.match_pass, x, real, t, self.loss_func, self.settings.match_weight)

    def calib_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Calibration loss [K]; every sample of an image has its labels."""
        targets = targets.repeat_interleave(self.samples_per_row, 0)
        x = self.calib_view(x)
        return compute_calib_loss(self.calib_pass, x, targets, self.tile_size, self.settings.calib_weight)

    def assemble(self, data: Tensor, mask: Tensor | None, targets: Tensor) -> SyntheticSet:
        """The whole set from its parts, in class order."""
        s = self.settings
        owner = torch.tensor(self.every_class).repeat_interleave(s.ipc)
        meta: dict[str, str | int | float] = {
            "dataset": self.dataset, "decode_type": s.decode_type, "factor": s.factor, "ipc": s.ipc,
        }  # fmt: skip
        return SyntheticSet(data.clamp(0, 1), targets, owner, None, meta)
