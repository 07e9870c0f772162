"""Students of image sets with or without feature labels: one schedule for all, tested with and without views."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from condenser.feature_labels import FeatureConfig, Scope, drawn_labels, expand, labelled_loss
from condenser.synthetic_set import SyntheticSet
from config import ConfigError
from utils.augment import Augmenter, BatchAugmentConfig, view_logits, views
from utils.fit import FitConfig, fit, make_optimizer
from utils.image_networks import ImageNetwork, NetType
from utils.invariant import TILE, tiled, tiled_gradients
from utils.losses import task_loss
from utils.sampling import training_batch
from utils.streams import generator
from utils.utils_image import ImageSet

BatchInvariant = Literal["off", "eval", "train"]
PASS = 256  # images of a test pass


class StudentConfig(FitConfig, BatchAugmentConfig):
    """How students are trained and tested, the same for all rows."""

    steps: int = Field(ge=1)
    learned_lr: bool = False  # on a set that has learned a step size: it, in place of lr and head_lr
    repeat: int = Field(3, ge=1)  # students of a row and learned set
    probe_every: int = Field(50, ge=1)  # steps between the states of which the best on validation is tested
    tta: bool = True  # also with the mean logits of several views
    tta_mode: str = "hflip"
    batch_invariant: BatchInvariant = "off"  # eval: logits, train: also gradients, whatever the batches' sizes
    architectures: tuple[NetType, ...] = ()  # further students, beside those of network.net_type

    @field_validator("tta_mode")
    @classmethod
    def known(cls, value: str) -> str:
        """The views exist."""
        views(torch.zeros(1, 1, 8, 8), value)
        return value


@dataclass(frozen=True)
class FeatureSet:
    """What students are trained on."""

    images: Tensor | ImageSet  # [N, C, H, W], normalised, or real ones
    targets: Tensor  # [N, classes]
    labels: Tensor | None = None  # [K, N, *form]
    lr: float | None = None  # the step size that was learned with the set

    def input(self, which: Tensor) -> Tensor:
        """Normalised images [B, C, H, W]."""
        if isinstance(self.images, Tensor):
            return self.images[which]
        return self.images.input(which, self.targets.device)

    def to(self, device: torch.device) -> "FeatureSet":
        """On a device."""
        labels = None if self.labels is None else self.labels.to(device)
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return FeatureSet(images, self.targets.to(device), labels, self.lr)


@dataclass(frozen=True)
class FeatureScore:
    """Accuracy in percent of one student: its last state and that which is best on validation; seconds of training."""

    last: float
    last_views: float  # with test-time views
    selected: float
    selected_views: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        """Name -> number."""
        return asdict(self)


def feature_set(found: SyntheticSet, with_labels: bool) -> FeatureSet:
    """A learned set as students read it. Raises ConfigError where it has no normaliser."""
    if found.normaliser is None:
        raise ConfigError("synthetic set: has no normaliser, without which its images cannot be used: make it anew")
    labels = None
    if with_labels and found.features is not None:
        scope: Scope = "class" if found.meta.get("scope") == "class" else "sample"
        _, places = found.owner.unique(return_inverse=True)  # a row of labels for every class that is there
        labels = expand(found.features, places, scope)
    lr = found.meta.get("lr")
    return FeatureSet(found.normaliser(found.data), found.targets, labels, None if lr is None else float(lr))


def student_loss(
    net: ImageNetwork, train: FeatureSet, feature: FeatureConfig | None, settings: StudentConfig,
    stream: tuple[int, str, int],
) -> Callable[[int], Tensor]:  # fmt: skip
    """The scalar that a training step goes down: CE, with labels + lbd * MSE(phi(E_L(x)), F)."""
    augment = Augmenter(settings.aug_type, settings.cutmix, settings.mixup)
    parameters = list(net.parameters())

    def loss(step: int) -> Tensor:
        which = training_batch(torch.ones(len(train.targets)), settings.batch_size, step, stream[0], stream[2])
        gen = generator(stream[0], "augmentation", stream[2], step)
        x, targets = augment(train.input(which), train.targets[which], gen)
        f, labels = feature, train.labels
        drawn = None if f is None or labels is None else drawn_labels(labels, which, f.use_feature, gen)

        def losses(part: slice) -> Tensor:
            if f is None or drawn is None:
                return task_loss(net(x[part]).logits, targets[part], multilabel=False)
            where = (f.lbd, f.form, f.pooling, f.layer_idx)
            return labelled_loss(net, x[part], targets[part], drawn[part], *where)

        if settings.batch_invariant != "train":
            return losses(slice(None)).mean()
        value, *gradients = (
            total / len(x) for total in tiled_gradients(lambda part: losses(part).sum(), parameters, range(len(x)))
        )
        # The value, whose gradient by each parameter is exactly that of the tiles.
        slopes = zip(parameters, gradients, strict=True)
        return value + torch.stack([((p - p.detach()) * g).sum() for p, g in slopes]).sum()

    return loss


@torch.no_grad()
def accuracy(net: ImageNetwork, data: ImageSet, mode: str, invariant: BatchInvariant, device: torch.device) -> float:
    """Percent of a real set, logits being means over views of the raw pixels."""
    net.eval()

    def logits(x: Tensor) -> Tensor:
        return net(x).logits

    forward = logits if invariant == "off" else (lambda x: tiled(logits, x, TILE))
    hits = 0
    for which in torch.arange(len(data)).split(PASS):
        found = view_logits(forward, data.pixels(which).to(device), mode, data.normaliser)
        hits += int((found.argmax(1).cpu() == data.labels[which]).sum())
    return 100 * hits / len(data)


def judge_feature_student(
    net: ImageNetwork, train: FeatureSet, feature: FeatureConfig | None, val: ImageSet, test: ImageSet,
    settings: StudentConfig, device: torch.device, stream: tuple[int, str, int],
    on_step: Callable[[], None] = lambda: None,
) -> FeatureScore:  # fmt: skip
    """Train a fresh student on a set and test it; validation chooses among its states, the test set among none."""
    net, train, began = net.to(device), train.to(device), time.monotonic()
    if settings.learned_lr and train.lr is not None:
        settings = settings.model_copy(update={"lr": train.lr, "head_lr": None})
    modes = ("none", settings.tta_mode if settings.tta else "none")
    loss, optimizer = student_loss(net, train, feature, settings, stream), make_optimizer(net, settings)
    best, kept = -1.0, dict[str, Tensor]()
    for step, _ in fit(net, loss, optimizer, settings, range(settings.steps), settings.steps, stream):
        on_step()
        if (step + 1) % settings.probe_every == 0 or step + 1 == settings.steps:
            held_out = accuracy(net, val, "none", settings.batch_invariant, device)
            if held_out > best:
                best, kept = held_out, {name: p.detach().clone() for name, p in net.state_dict().items()}
            net.train()
    seconds = time.monotonic() - began

    def tested() -> tuple[float, float]:
        found = {mode: accuracy(net, test, mode, settings.batch_invariant, device) for mode in dict.fromkeys(modes)}
        return found[modes[0]], found[modes[1]]

    last = tested()
    net.load_state_dict(kept)
    return FeatureScore(*last, *tested(), seconds)
