"""Feature labels: a sample (x, y, F) whose students learn by CE(f(x), y) + lbd * MSE(phi(E_L(x)), F) (DRUPI, 2024).

E_L(x) [B, C, H, W] is the map after block L. F is stored in the form phi, K = n_feat times for a sample or a class.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from config import ConfigError, Section
from utils.image_networks import ImageNetwork
from utils.losses import task_loss

FeatureForm = Literal["map", "channel", "spatial"]
Pool = Literal["avg", "max", "sum"]
Use = Literal["mean", "random"]
Scope = Literal["sample", "class"]
Shape = tuple[int, int, int]
POOL: dict[Pool, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "avg": torch.mean, "max": torch.amax, "sum": torch.sum,
}  # fmt: skip
NO_HEAD = "form: spatial has no channels that a head could read; set feat_lbd: 0, or form: map or channel"


class FeatureConfig(Section):
    """What feature labels are, how they start, and how they are learned."""

    lbd: float = Field(0.1, ge=0)  # of the mean squared error over all elements
    lbd_contrast: float = Field(0.0, ge=0)  # of supervised_contrast
    feat_lbd: float = Field(0.0, ge=0)  # of CE(C(F), y), C the network's own later layers
    form: FeatureForm = "map"
    pooling: Pool = "avg"  # of form: channel, over H x W
    layer_idx: int | None = Field(None, ge=1)  # block whose map is labelled, 1 = the first; None = the last
    n_feat: int = Field(1, ge=1)  # labels of a sample
    use_feature: Use = "mean"  # of several: their mean, or one at random a sample and step
    scope: Scope = "sample"  # class: all samples of a class share theirs
    epochs: int = Field(1, ge=0)  # on real data, of the network whose features are the start values
    learn: bool = True  # false: they stay the start values
    lr_feat: float = Field(0.01, gt=0)
    lr_feat_rel: bool = False  # lr_feat counts in n / (2 lbd), n elements a batch: F's gradient shrinks with 2 lbd / n
    feat_opt: Literal["sgd", "adam"] = "adam"
    mom_feat: float = Field(0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def check(self) -> "FeatureConfig":
        """A form is given only what it can use, a relative rate only where it means something."""
        if self.form == "spatial" and self.feat_lbd:
            raise ValueError(f"feat_lbd: {self.feat_lbd}, but {NO_HEAD}")
        if self.form != "channel" and self.pooling != "avg":
            raise ValueError(f"pooling: {self.pooling}, but form: {self.form} is not pooled; set avg, or form: channel")
        if self.lr_feat_rel and (self.feat_opt == "adam" or not self.lbd):
            reason = "lbd is 0" if not self.lbd else "Adam's steps do not shrink with the gradient"
            raise ValueError(f"lr_feat_rel: true counts lr_feat in n / (2 lbd), but {reason}; set false")
        return self


def label_optimizer(labels: Tensor, f: FeatureConfig, samples: int) -> torch.optim.Optimizer:
    """Of labels [n, K, *form]; a relative rate counts in N / (2 lbd), N the elements of the labels of `samples`."""
    rate = f.lr_feat * (samples * labels.shape[2:].numel() / (2 * f.lbd) if f.lr_feat_rel else 1.0)
    if f.feat_opt == "adam":
        return torch.optim.Adam([labels], lr=rate)
    return torch.optim.SGD([labels], lr=rate, momentum=f.mom_feat)


def feature_of(maps: Tensor, form: FeatureForm, pool: Pool) -> Tensor:
    """phi of maps [B, C, H, W]: themselves, channel [B, C] pooled over H x W, or spatial [B, H, W], mean over C."""
    if form == "channel":
        return POOL[pool](maps, (2, 3))
    return maps.mean(1) if form == "spatial" else maps


def label_shape(map_shape: Shape, form: FeatureForm) -> tuple[int, ...]:
    """Shape of a label for maps (C, H, W)."""
    return {"map": map_shape, "channel": map_shape[:1], "spatial": map_shape[1:]}[form]


def feature_loss(maps: Tensor, labels: Tensor, form: FeatureForm, pool: Pool) -> Tensor:
    """Squared error [B] of maps [B, C, H, W] and labels [B, *form], mean over a label's elements."""
    return (feature_of(maps, form, pool) - labels).square().flatten(1).mean(1)


def labelled_loss(
    net: ImageNetwork, x: Tensor, targets: Tensor, labels: Tensor, lbd: float, form: FeatureForm, pool: Pool,
    layer_idx: int | None,
) -> Tensor:  # fmt: skip
    """What every network learns the set by: CE(f(x), y) + lbd * MSE(phi(E_L(x)), F) of every sample [B]."""
    output, maps = net.with_map(x, layer_idx)
    return task_loss(output.logits, targets, multilabel=False) + lbd * feature_loss(maps, labels, form, pool)


def expand(features: Tensor, owner: Tensor, scope: Scope) -> Tensor:
    """Labels [K, N, *form] of N samples whose classes are `owner` [N], from [K, N, *form] or [K, classes, *form]."""
    return features[:, owner] if scope == "class" else features


def drawn_labels(features: Tensor, samples: Tensor, use: Use, gen: Generator) -> Tensor:
    """Labels [B, *form] of `samples` [B] from features [K, N, *form]: the mean of K, or one of them for each sample."""
    if use == "mean":
        return features[:, samples].mean(0)
    return features[torch.randint(len(features), samples.shape, generator=gen).to(samples.device), samples]


def feature_logits(
    net: ImageNetwork, labels: Tensor, form: FeatureForm, pool: Pool, layer_idx: int | None, map_shape: Shape
) -> Tensor:
    """C(F): logits [B, classes] of labels [B, *form] as maps (C, H, W) after block `layer_idx`, by `net`'s own later
    layers; a channel label stands at every pixel. Raises ConfigError for form: spatial."""
    if form == "spatial":
        raise ConfigError(f"feature.{NO_HEAD}")
    if form == "channel":
        _, height, width = map_shape
        labels = labels[..., None, None].expand(-1, -1, height, width) / (height * width if pool == "sum" else 1)
    return net.from_map(labels, layer_idx)


def supervised_contrast(features: Tensor, owner: Tensor, form: FeatureForm, tau: float = 0.07) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, L_out) of all labels [K, N, *form], classes `owner` [N].
    z = GAP of a map, the channels, or the centred spatial label, of unit length; 0 if no class has two labels."""
    z = features.flatten(0, 1).flatten(2).mean(2) if form == "map" else features.flatten(0, 1).flatten(1)  # [KN, D]
    z = z - z.mean(1, keepdim=True) if form == "spatial" else z
    length = z.norm(dim=1, keepdim=True)
    z = z / length.masked_fill(length == 0, torch.inf)  # without a direction: 0, and no gradient
    classes = owner.repeat(len(features))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (classes[:, None] == classes) & ~itself  # [KN, KN]
    log_p = (z @ z.T / tau).masked_fill(itself, -torch.inf).log_softmax(1)
    count = positive.sum(1)
    each = log_p.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    return -each.sum() / (count > 0).sum().clamp_min(1)


@torch.no_grad()
def discriminability(features: Tensor, owner: Tensor) -> float:
    """Mean distance of labels [K, N, *form] within a class over that between classes; NaN where either has no pair."""
    rows, classes = features.flatten(0, 1).flatten(1), owner.repeat(len(features))
    distance, same = torch.cdist(rows, rows), classes[:, None] == classes
    within = same & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return float(distance[within].mean() / distance[~same].mean())


def float_count(
    image_shape: Shape, label_shape: tuple[int, ...], n_feat: int, ipc: int, scope: Scope, soft_labels: int = 0
) -> float:
    """Float32 numbers stored a class: ipc images (C, H, W) with `soft_labels` numbers each, and their n_feat labels."""
    owners = ipc if scope == "sample" else 1
    return ipc * (math.prod(image_shape) + soft_labels) + owners * n_feat * math.prod(label_shape)


def image_equivalents(
    image_shape: Shape, label_shape: tuple[int, ...], n_feat: int, ipc: int, scope: Scope, soft_labels: int = 0
) -> float:
    """`float_count` in images a class."""
    return float_count(image_shape, label_shape, n_feat, ipc, scope, soft_labels) / math.prod(image_shape)


def fair_ipc(
    budget_images: float,
    image_shape: Shape,
    label_shape: tuple[int, ...],
    n_feat: int,
    scope: Scope,
    soft_labels: int = 0,
) -> int:
    """The largest ipc that takes no more floats than `budget_images` images a class; 0 where not even one fits."""
    fixed, one = (float_count(image_shape, label_shape, n_feat, ipc, scope, soft_labels) for ipc in (0, 1))
    return max(0, int((budget_images * math.prod(image_shape) - fixed) // (one - fixed)))
