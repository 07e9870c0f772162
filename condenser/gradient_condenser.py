"""Gradient matching that learns images and feature labels: DC (Zhao, Mopuri & Bilen, ICLR 2021), DSA (Zhao & Bilen,
ICML 2021), and labels as in DRUPI (2024).

An iteration starts from a fresh network and alternates `outer` steps on the set with `inner` epochs of the network on
the set, by CE(f(x), y) + lbd * MSE(phi(E_L(x)), F).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from condenser.feature_labels import (
    FeatureConfig,
    Scope,
    Shape,
    discriminability,
    drawn_labels,
    expand,
    feature_logits,
    label_optimizer,
    labelled_loss,
    supervised_contrast,
)
from condenser.gradient_matching import (
    GradientDistance,
    class_gradients,
    encoder_names,
    feature_class_gradients,
    gradient_distance,
    label_gradients,
    matched_names,
)
from condenser.loop import Learner, Rows, SetConfig
from condenser.synthetic_set import Note, SyntheticSet
from utils.augment import draw_augmentation, operations
from utils.ddp import World
from utils.image_networks import ImageNetwork
from utils.losses import task_loss
from utils.sampling import ClassSampler
from utils.streams import generator
from utils.utils_image import ImageSet

# Published steps on the set and epochs on the network between them, by images a class; DRUPI's for 5, 9, 48 and 49.
SCHEDULE = {1: (1, 1), 5: (5, 10), 9: (10, 50), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 48: (50, 10),
            49: (50, 10), 50: (50, 10)}  # fmt: skip
CPU_TILE = 64  # images a pass where classes come one after another
BATCH_NORM_IMAGES = 16  # real images a class that give batch norm its statistics for the matching


class GradientConfig(SetConfig):
    """What is matched, and how images and network move; DSA is of real and synthetic images alike."""

    niter: int = Field(1000, ge=0)
    dis_metric: GradientDistance = "ours"
    outer_loop: int | None = Field(None, ge=1)  # None: of the published schedule, at the nearest ipc
    inner_loop: int | None = Field(None, ge=0)
    lr_net: float = Field(0.01, gt=0)
    batch_train: int = Field(256, ge=1)
    batched: bool | None = None  # gradients of all classes in one pass, as suits a GPU; None: on a GPU

    @model_validator(mode="after")
    def check_init(self) -> "GradientConfig":
        """There are no experts here."""
        if self.init == "correct":
            raise ValueError("init: correct asks experts, and gradient matching has none; set real")
        return self

    @property
    def loops(self) -> tuple[int, int]:
        """Steps on the set, and epochs of the network between two of them."""
        outer, inner = SCHEDULE[min(SCHEDULE, key=lambda ipc: (abs(ipc - self.ipc), ipc))]
        return self.outer_loop or outer, inner if self.inner_loop is None else self.inner_loop


def sgd_step(net: nn.Module, loss: Tensor, lr: float) -> None:
    """A plain step of gradient descent, which the published inner loop takes."""
    parameters = list(net.parameters())
    with torch.no_grad():
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.sub_(grad, alpha=lr)


class GradientCondenser(Learner):
    """Images [n, C, H, W], normalised, and feature labels [n, K, *form] (or a row a class) of this rank's classes."""

    settings: GradientConfig

    def __init__(
        self,
        *,
        nclass_list: Sequence[Sequence[int]],
        settings: GradientConfig,
        feature: FeatureConfig | None,
        images: ImageSet,
        start: SyntheticSet,
        network: Callable[[int], ImageNetwork],
        map_shape: Shape,
        batch_real: int,
        seed: int,
        world: World,
        meta: dict[str, Note],
    ) -> None:
        """`nclass_list[r]`: classes of rank r; `start`: the whole set as it begins; `network(i)`: iteration i's, with
        maps (C, H, W) at the labelled layer."""
        self.map_shape = map_shape
        batched = world.device.type == "cuda" if settings.batched is None else settings.batched
        self.tile = None if batched else CPU_TILE
        self.settings, self.feature, self.images, self.network = settings, feature, images, network
        self.seed, self.world, self.meta = seed, world, meta
        self.parts = [list(part) for part in nclass_list]
        self.classes, self.every_class = self.parts[world.rank], sorted(c for part in nclass_list for c in part)
        members = images.members()
        least = min(len(members[c]) for c in self.every_class)
        self.sampler = ClassSampler(members, min(batch_real, least), seed)  # one size, so that classes share a pass
        own, device = self.row_owners[world.rank], world.device
        self.owner, self.targets = start.owner.to(device), start.targets.to(device)
        self.class_places = torch.arange(len(self.every_class), device=device).repeat_interleave(settings.ipc)
        self.scope: Scope = "sample" if feature is None else feature.scope
        self.data = images.normaliser(start.data)[own].to(device).requires_grad_(settings.learn_images)
        self.image_optimizer = torch.optim.SGD([self.data], lr=settings.lr_img, momentum=settings.mom_img)
        self.labels: Tensor | None = None
        if feature is not None and start.features is not None:
            whole = start.features.transpose(0, 1)  # [N or classes, K, *form]
            self.labels = whole[self.label_owners[world.rank]].to(device).requires_grad_(feature.learn)
            self.label_optimizer = label_optimizer(self.labels, feature, settings.ipc)

    @property
    def row_owners(self) -> list[list[int]]:
        """Positions in the whole set of every rank's images, which are in class order."""
        ipc, place = self.settings.ipc, {c: i for i, c in enumerate(self.every_class)}
        return [[place[c] * ipc + i for c in part for i in range(ipc)] for part in self.parts]

    @property
    def label_owners(self) -> list[list[int]]:
        """Of every rank's feature labels: as the images, or of a row a class."""
        if self.scope == "sample":
            return self.row_owners
        place = {c: i for i, c in enumerate(self.every_class)}
        return [[place[c] for c in part] for part in self.parts]

    @property
    def learned(self) -> dict[str, Rows]:
        """Images and feature labels, as far as they are learned."""
        rows = {}
        if self.settings.learn_images:
            rows["data"] = Rows(self.data, self.image_optimizer, self.row_owners)
        if self.labels is not None and self.labels.requires_grad:
            rows["features"] = Rows(self.labels, self.label_optimizer, self.label_owners)
        return rows

    def iterate(self, done: int) -> dict[str, float]:
        """A fresh network, trained on the set between the steps on it."""
        outer, inner = self.settings.loops
        net = self.network(done).to(self.world.device)
        sums: dict[str, float] = {}
        for turn in range(outer):
            found = self.match(net, done * outer + turn)
            sums = {name: sums.get(name, 0.0) + value / outer for name, value in found.items()}
            if turn + 1 < outer:
                self.train(net, inner, done * outer + turn)
        return sums | {"count": float(len(self.classes))}

    def seen(self, done: int) -> dict[str, Any]:
        """Of every class of this rank the real samples of every step."""
        outer, _ = self.settings.loops
        keys = range(done * outer, (done + 1) * outer)
        return {"classes": {c: [self.sampler.draw(c, key).tolist() for key in keys] for c in self.classes}}

    def match(self, net: ImageNetwork, key: int) -> dict[str, float]:
        """One step on images and labels against draw `key` of real images: sums of the losses over the classes."""
        s, f = self.settings, self.feature
        self.freeze_statistics(net, key)
        labels = self.labels if self.labels is not None and self.labels.requires_grad else None
        # Every rank takes part in what ranks exchange, also one without a class.
        contrast = f is not None and f.lbd_contrast > 0
        every_label = self.whole(labels, self.label_owners) if labels is not None and contrast else None
        sums = ({"match": 0.0} if s.learn_images else {}) | ({} if labels is None else {"label_match": 0.0})
        if not self.classes:
            return sums
        names = matched_names(net, [name for name, _ in net.named_parameters()], s.dis_metric)
        eye = torch.eye(self.targets.shape[1]).to(self.data)[self.classes][:, None]  # [K, 1, classes]
        real_x = self.viewed(self.real(self.classes, key), key)  # [K, B, C, H, W]
        real = class_gradients(net, names, real_x, eye.expand(-1, real_x.shape[1], -1), self.tile)
        x = self.viewed(self.data.unflatten(0, (-1, s.ipc)), key)  # [K, ipc, C, H, W]
        targets = eye.expand(-1, s.ipc, -1)
        if f is not None and labels is not None:
            encoder = matched_names(net, encoder_names(net, f.layer_idx), s.dis_metric)
            real_encoder = [g for name, g in zip(names, real, strict=True) if name in encoder]
            place = (net, encoder, x.detach(), targets)
            sums["label_match"] = self.label_gradient(f, labels, every_label, real_encoder, *place)
        if s.learn_images:
            slopes = []  # of one class after another, so that only one graph lives at a time
            for part in [slice(None)] if self.tile is None else [slice(i, i + 1) for i in range(len(x))]:
                leaf = x[part].detach().requires_grad_()
                syn = class_gradients(net, names, leaf, targets[part], self.tile)
                loss = gradient_distance(syn, [g[part] for g in real], s.dis_metric).sum()
                slopes.append(torch.autograd.grad(loss, leaf)[0])
                sums["match"] += float(loss.detach())
            (self.data.grad,) = torch.autograd.grad(x, self.data, torch.cat(slopes))
            self.image_optimizer.step()
        if labels is not None:
            self.label_optimizer.step()
        return sums

    def label_gradient(
        self, f: FeatureConfig, labels: Tensor, every_label: Tensor | None, real: Sequence[Tensor], net: ImageNetwork,
        encoder: Sequence[str], x: Tensor, targets: Tensor,
    ) -> float:  # fmt: skip
        """Give the labels the gradient of D(grad(CE + lbd MSE), real), summed over classes and the n_feat labels,
        + feat_lbd CE(C(F), y) + lbd_contrast contrast, both means; returns the first for one label."""
        s, total, objective = self.settings, 0.0, labels.new_zeros(())
        where = (f.lbd, f.form, f.pooling, f.layer_idx, self.tile)
        for k in range(f.n_feat):
            rows = labels[:, k].unflatten(0, (len(self.classes), -1)).expand(-1, s.ipc, *labels.shape[2:])
            gradients = feature_class_gradients(net, encoder, x, targets, rows.detach(), *where)
            gradients = [g.requires_grad_() for g in gradients]
            loss = gradient_distance(gradients, real, s.dis_metric).sum()
            slope = label_gradients(net, encoder, x, torch.autograd.grad(loss, gradients), *where)
            objective = objective + (slope * rows).sum()  # whose gradient by the rows is the slope
            total += float(loss.detach()) / f.n_feat
            if f.feat_lbd:
                logits = feature_logits(net, rows.flatten(0, 1), f.form, f.pooling, f.layer_idx, self.map_shape)
                ce = task_loss(logits, targets.flatten(0, 1), multilabel=False).sum()
                objective = objective + f.feat_lbd * ce / (len(self.owner) * f.n_feat)
        if every_label is not None:
            own = torch.tensor(self.label_owners[self.world.rank], device=labels.device)
            whole = every_label.index_put((own,), labels).transpose(0, 1)  # [K, N or classes, *form]
            owner = self.owner if f.scope == "sample" else torch.tensor(self.every_class, device=labels.device)
            objective = objective + f.lbd_contrast * supervised_contrast(whole, owner, f.form)
        (labels.grad,) = torch.autograd.grad(objective, labels)
        return total

    def train(self, net: ImageNetwork, epochs: int, key: int) -> None:
        """Train the network on the whole set, the same on every rank."""
        s, f = self.settings, self.feature
        x = self.whole(self.data, self.row_owners)
        labels = None
        if f is not None and self.labels is not None:
            whole = self.whole(self.labels, self.label_owners).transpose(0, 1)
            labels = expand(whole, self.class_places, f.scope)
        net.train()
        for epoch in range(epochs):
            gen = generator(self.seed, "inner loop", key, epoch)
            order = torch.randperm(len(x), generator=gen)
            for which in order.split(s.batch_train):
                rows = draw_augmentation(s.aug_type, len(which), gen)(x[which])
                if f is None or labels is None:
                    loss = task_loss(net(rows).logits, self.targets[which], multilabel=False)
                else:
                    drawn = drawn_labels(labels, which, f.use_feature, gen)
                    where = (f.lbd, f.form, f.pooling, f.layer_idx)
                    loss = labelled_loss(net, rows, self.targets[which], drawn, *where)
                sgd_step(net, loss.mean(), s.lr_net)

    def real(self, classes: Sequence[int], key: int, most: int | None = None) -> Tensor:
        """Draw `key` of the real images of classes, at most `most` of each, normalised [K, B, C, H, W]."""
        which = torch.stack([self.sampler.draw(c, key) for c in classes])[:, :most]
        return self.images.input(which.flatten(), self.data.device).to(self.data.dtype).unflatten(0, which.shape)

    def viewed(self, rows: Tensor, key: int) -> Tensor:
        """Images [K, n, C, H, W] of every class in its view of draw `key`, the same for real and synthetic ones."""
        kind = self.settings.aug_type
        if not operations(kind):
            return rows
        views = (draw_augmentation(kind, 1, generator(self.seed, "view", c, key)) for c in self.classes)
        return torch.stack([view(part) for view, part in zip(views, rows, strict=True)])

    def whole(self, own: Tensor, owners: list[list[int]]) -> Tensor:
        """Every rank's rows [N, ...], on every rank."""
        found = own.new_zeros(sum(map(len, owners)), *own.shape[1:])
        found[owners[self.world.rank]] = own.detach()
        return self.world.sum(found) if self.world.size > 1 else found

    def freeze_statistics(self, net: ImageNetwork, key: int) -> None:
        """Eval mode, batch norm having seen some real images of every class (as published)."""
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
            net.train()
            with torch.no_grad():
                net(self.real(self.every_class, key, BATCH_NORM_IMAGES).flatten(0, 1))
        net.eval()

    def logged(self) -> dict[str, float]:
        """How far labels of a class are from each other, over those of different classes."""
        if self.labels is None or not self.labels.requires_grad:
            return {}
        whole = self.whole(self.labels, self.label_owners).transpose(0, 1)
        value = discriminability(expand(whole, self.class_places, self.scope), self.owner)
        return {"label_spread": value} if value == value else {}

    def gather(self) -> SyntheticSet | None:
        """The whole set on rank 0, as pixels."""
        data = self.world.gather_rows(self.data, self.row_owners)
        labels = None if self.labels is None else self.world.gather_rows(self.labels, self.label_owners)
        if data is None:
            return None
        norm = self.images.normaliser
        features = None if labels is None else labels.transpose(0, 1).contiguous()
        return SyntheticSet(norm.inverse(data), self.targets.cpu(), self.owner.cpu(), None, self.meta, features, norm)
