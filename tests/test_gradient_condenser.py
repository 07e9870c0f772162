"""The engine of DC with feature labels: its steps are plain autograd's, what is frozen stays, runs go on to the bit."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condenser.feature_labels import FeatureConfig, feature_of, label_shape, supervised_contrast
from condenser.gradient_condenser import GradientCondenser, GradientConfig
from condenser.gradient_matching import GradientDistance
from condenser.loop import learning_loop
from condenser.synthetic_set import SyntheticSet, load_synthetic
from utils.augment import draw_augmentation
from utils.ddp import World, distribute_class, process_group
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.run_folder import RunFolder
from utils.stopping import StopFlag, Stopped
from utils.streams import generator
from utils.utils_image import ImageSet

CLASSES, IPC, COUNT, SIZE, WIDTH, SEED = 3, 2, 5, 8, 4, 7
DSA = "color_crop_cutout_flip_scale_rotate"
NORM = Normaliser(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]))
exactly = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


def network(number: int = 0, norm: Any = "group") -> ImageNetwork:
    settings = ImageNetworkConfig(depth=2, width=WIDTH, norm_type=norm)
    return image_network(settings, 3, SIZE, CLASSES, SEED, "test", number)


def real_images(classes: int = CLASSES) -> ImageSet:
    """COUNT random images a class, class after class."""
    pixels = torch.randint(0, 256, (classes * COUNT, 3, SIZE, SIZE), generator=generator(1, "test"), dtype=torch.uint8)
    return ImageSet(pixels, torch.eye(classes).repeat_interleave(COUNT, 0), SIZE, NORM)


@pytest.fixture
def world() -> Iterator[World]:
    with process_group(torch.device("cpu")) as world:
        yield world


def maps_of(f: FeatureConfig | None) -> tuple[int, int, int]:
    side = SIZE // 2 if f and f.layer_idx == 1 else SIZE // 4
    return WIDTH, side, side


def make(
    world: World, feature: FeatureConfig | None = None, *, classes: int = CLASSES, kept: list[int] | None = None,
    dtype: torch.dtype = torch.float64, net: Callable[[int], ImageNetwork] = network, start: Tensor | None = None,
    **settings: Any,
) -> GradientCondenser:  # fmt: skip
    """Over whole classes of real images, so that every draw is the same."""
    s = GradientConfig(**{"ipc": IPC, "niter": 4, "outer_loop": 2, "inner_loop": 2, "lr_img": 0.1} | settings)
    kept = kept or list(range(classes))
    owner = torch.tensor(kept).repeat_interleave(s.ipc)
    pixels = torch.sigmoid(draw(len(owner), 3, SIZE, SIZE)) if start is None else start
    features = None
    if feature:
        rows = len(owner) if feature.scope == "sample" else len(kept)
        features = draw(feature.n_feat, rows, *label_shape(maps_of(feature), feature.form), seed=1).to(dtype)
    targets = torch.eye(classes, dtype=dtype)[owner]
    return GradientCondenser(
        nclass_list=[kept], settings=s, feature=feature, images=real_images(classes),
        start=SyntheticSet(pixels.to(dtype), targets, owner, None, {}, features, NORM),
        network=lambda i: net(i).to(dtype), map_shape=maps_of(feature), batch_real=COUNT, seed=SEED, world=world,
        meta={"scope": feature.scope} if feature else {},
    )  # fmt: skip


def distance(syn: list[Tensor], real: list[Tensor], kind: GradientDistance) -> Tensor:
    """Of one class, as the authors write it."""
    if kind == "ours":
        rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(syn, real, strict=True) if a.ndim > 1]
        cosines = [(a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6) for a, b in rows]
        return torch.stack([(1 - cosine).sum() for cosine in cosines]).sum()
    a, b = (torch.cat([g.flatten() for g in side]) for side in (syn, real))
    return (a - b).square().sum() if kind == "mse" else 1 - a @ b / (a.norm() * b.norm() + 1e-6)


def gradients(net: nn.Module, loss: Tensor, graph: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), create_graph=graph))


def class_batch(c: int, key: int, x: Tensor, aug: str) -> tuple[Tensor, Tensor, Tensor]:
    """Real images of class c and learned ones x, in the view of the class and draw, and the class of each of x."""
    view = draw_augmentation(aug, 1, generator(SEED, "view", c, key))
    pixels = real_images().pixels(torch.arange(c * COUNT, (c + 1) * COUNT))
    return view(NORM(pixels).double()), view(x), torch.full((len(x),), c)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["ours", "mse", "cos"])
@pytest.mark.parametrize("lbd", [None, 0.0, 0.3])
def test_a_step_on_the_images_is_the_published_one(
    world: World, lbd: float | None, kind: GradientDistance, batched: bool
) -> None:
    feature = None if lbd is None else FeatureConfig(lbd=lbd)
    condenser = make(world, feature, aug_type=DSA, dis_metric=kind, batched=batched, mom_img=0.5)
    x, momentum = condenser.data.detach().clone().requires_grad_(), torch.zeros_like(condenser.data)
    for key in range(2):
        net = network().double().eval()
        total = torch.zeros((), dtype=torch.float64)
        for c in range(CLASSES):
            real, syn, label = class_batch(c, key, x[c * IPC : (c + 1) * IPC], DSA)
            wanted = gradients(net, F.cross_entropy(net(real).logits, torch.full((COUNT,), c)), False)
            total = total + distance(gradients(net, F.cross_entropy(net(syn).logits, label), True), wanted, kind)
        (slope,) = torch.autograd.grad(total, x)
        momentum = 0.5 * momentum + slope
        x = (x - 0.1 * momentum).detach().requires_grad_()
        assert condenser.match(network().double(), key)["match"] == pytest.approx(total.item())
        exactly(condenser.data.detach(), x.detach())
    assert float(slope.abs().max()) > 1e-4


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scope", ["sample", "class"])
@pytest.mark.parametrize(
    ("form", "layer_idx", "kind"),
    [("map", None, "ours"), ("map", 1, "mse"), ("channel", None, "mse"), ("channel", 1, "ours")],
)
def test_a_step_on_the_labels_is_plain_autograd_s(
    world: World, form: Any, layer_idx: int | None, kind: GradientDistance, scope: Any, batched: bool
) -> None:
    f = FeatureConfig(
        lbd=0.3, lbd_contrast=0.2, feat_lbd=0.4, form=form, layer_idx=layer_idx, n_feat=2, scope=scope, lr_feat=0.1,
        feat_opt="sgd",
    )  # fmt: skip
    condenser = make(world, f, aug_type=DSA, dis_metric=kind, batched=batched)
    x, before = condenser.data.detach().clone(), condenser.labels
    assert before is not None
    labels = before.detach().clone().requires_grad_()  # [N or classes, 2, *form]
    net, total, match = network().double().eval(), torch.zeros((), dtype=torch.float64), 0.0
    owner = torch.arange(CLASSES).repeat_interleave(IPC if scope == "sample" else 1)
    for c in range(CLASSES):
        real, syn, label = class_batch(c, 0, x[c * IPC : (c + 1) * IPC], DSA)
        wanted = gradients(net, F.cross_entropy(net(real).logits, torch.full((COUNT,), c)), False)
        for k in range(2):
            rows = labels[owner == c, k]
            rows = rows if scope == "sample" else torch.cat([rows] * IPC)
            output, maps = net.with_map(syn, layer_idx)
            loss = F.cross_entropy(output.logits, label) + 0.3 * F.mse_loss(feature_of(maps, form, "avg"), rows)
            found = distance(gradients(net, loss, True), wanted, kind)
            shown = rows if form == "map" else rows[..., None, None].expand(-1, -1, *maps.shape[2:])
            for block in net.blocks[len(net.blocks) if layer_idx is None else layer_idx :]:
                shown = block(shown)
            ce = F.cross_entropy(net.head(net.join(shown)), label, reduction="sum") / (2 * CLASSES * IPC)
            total, match = total + found + 0.4 * ce, match + found.item() / 2
    total = total + 0.2 * supervised_contrast(labels.transpose(0, 1), owner, form)
    (slope,) = torch.autograd.grad(total, labels)
    sums = condenser.match(network().double(), 0)
    if kind == "mse" and layer_idx is None:
        assert sums["label_match"] < match  # of the encoder alone, the only part that labels move
    exactly(condenser.labels, labels.detach() - 0.1 * slope)
    assert float(slope.abs().max()) > 1e-4


@pytest.mark.parametrize("scope", ["sample", "class"])
def test_the_network_between_steps_learns_the_set_by_plain_descent(world: World, scope: Any) -> None:
    f = FeatureConfig(lbd=0.5, n_feat=2, scope=scope, form="spatial")
    condenser, net = make(world, f, lr_net=0.05), network().double()
    assert condenser.labels is not None
    labels = condenser.labels.detach().mean(1)
    labels = labels if scope == "sample" else labels.repeat_interleave(IPC, 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        output, maps = net.with_map(condenser.data.detach())
        target = torch.arange(CLASSES).repeat_interleave(IPC)
        loss = F.cross_entropy(output.logits, target) + 0.5 * F.mse_loss(maps.mean(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other = network().double()
    condenser.train(other, 3, 0)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        exactly(one, two)


def test_an_iteration_starts_from_a_fresh_network_and_trains_it_between_steps_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list[tuple[Tensor, int]]()

    def match(net: ImageNetwork, key: int) -> dict[str, float]:
        steps.append((net.head.weight.detach().clone(), key))
        return {"match": float(key)}

    def train(net: ImageNetwork, epochs: int, key: int) -> None:
        trained.append(key)
        net.head.weight.data.add_(1)

    trained, condenser = list[int](), make(world, outer_loop=3)
    monkeypatch.setattr(condenser, "match", match)
    monkeypatch.setattr(condenser, "train", train)
    assert [condenser.iterate(done)["match"] for done in range(2)] == pytest.approx([1, 4])  # means of their steps
    assert [key for _, key in steps] == [0, 1, 2, 3, 4, 5] and trained == [0, 1, 3, 4]
    for turn, (weight, _) in enumerate(steps):
        fresh = network(turn // 3).double().head.weight.detach()
        torch.testing.assert_close(weight, fresh + turn % 3)


def test_what_is_frozen_does_not_move_and_what_is_learned_does(world: World) -> None:
    for images, labels in ((True, True), (False, True), (True, False)):
        condenser = make(world, FeatureConfig(learn=labels, n_feat=2), learn_images=images)
        assert condenser.labels is not None
        x, values = condenser.data.detach().clone(), condenser.labels.detach().clone()
        sums = condenser.iterate(0)
        assert (not condenser.data.equal(x), not condenser.labels.equal(values)) == (images, labels)
        assert ("match" in sums, "label_match" in sums) == (images, labels)
        assert list(condenser.learned) == ["data"] * images + ["features"] * labels
        whole = condenser.gather()
        assert whole is not None and whole.features is not None
        torch.testing.assert_close(NORM(whole.data), condenser.data.detach())
        assert torch.equal(whole.features, condenser.labels.detach().transpose(0, 1))


@pytest.mark.parametrize("kind", ["map", "channel", "spatial"])
def test_one_prototype_stands_for_all_images_of_a_class(world: World, kind: Any) -> None:
    """One row a class learns what a row a sample, tied by adding their gradients, would."""
    shared = make(world, FeatureConfig(scope="class", n_feat=2, form=kind))
    apart = make(world, FeatureConfig(scope="sample", n_feat=2, form=kind))
    assert shared.labels is not None and apart.labels is not None and len(shared.labels) == CLASSES
    with torch.no_grad():
        apart.labels.copy_(shared.labels.detach().repeat_interleave(IPC, 0))
    for condenser in (shared, apart):
        condenser.match(network().double(), 0)
    assert shared.labels.grad is not None and apart.labels.grad is not None
    tied = apart.labels.grad.unflatten(0, (CLASSES, IPC)).sum(1)
    exactly(shared.labels.grad, tied)
    assert tied.any()


def test_real_and_learned_images_meet_the_same_view(world: World) -> None:
    same = NORM(real_images().pixels(torch.arange(CLASSES * COUNT)))
    pixels = same * NORM.std[:, None, None] + NORM.mean[:, None, None]
    condenser = make(world, start=pixels.double(), ipc=COUNT, aug_type=DSA, dis_metric="mse", lr_img=1e-30)
    other = make(world, start=pixels.double().flip(0), ipc=COUNT, aug_type=DSA, dis_metric="mse")
    for key in range(4):
        assert condenser.match(network().double(), key)["match"] < 1e-12
        assert other.match(network().double(), key)["match"] > 1e-4
    rows = same.double().unflatten(0, (CLASSES, COUNT))[:1].expand(CLASSES, -1, -1, -1, -1)
    views = [condenser.viewed(rows, key) for key in range(2)]
    assert not torch.equal(views[0][0], views[0][1]) and not torch.equal(views[0], views[1])
    plain = make(world, start=pixels.double(), ipc=COUNT)
    assert torch.equal(plain.viewed(rows, 0), rows)


def test_batch_norm_is_fixed_by_real_images_while_gradients_are_matched(world: World) -> None:
    net = network(norm="batch")
    weight = net.get_parameter("blocks.0.0.weight").detach().clone()
    bias = net.get_parameter("blocks.0.0.bias").detach().clone()
    maps = F.conv2d(NORM(real_images().pixels(torch.arange(CLASSES * COUNT))), weight, bias, padding=1)
    for feature in (None, FeatureConfig(n_feat=2, feat_lbd=0.1)):
        condenser = make(world, feature, dtype=torch.float32, net=lambda i: network(i, "batch"))
        net = network(norm="batch")
        condenser.match(net, 0)
        module = net.get_submodule("blocks.0.1")
        assert isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None
        torch.testing.assert_close(module.running_mean, 0.1 * maps.mean((0, 2, 3)))  # published: one pass, momentum 0.1
        torch.testing.assert_close(module.running_var, 0.9 + 0.1 * maps.transpose(0, 1).flatten(1).var(1))
        assert all(torch.tensor(list(condenser.iterate(done).values())).isfinite().all() for done in range(2))
        assert condenser.data.isfinite().all()


@pytest.mark.parametrize("scope", ["sample", "class"])
def test_a_debug_run_keeps_the_first_classes_only(world: World, scope: Any) -> None:
    kept = distribute_class(14, True)

    def wide(number: int) -> ImageNetwork:
        return image_network(ImageNetworkConfig(depth=2, width=WIDTH, norm_type="group"), 3, SIZE, 14, SEED, "test", 0)

    condenser = make(world, FeatureConfig(scope=scope), classes=14, kept=kept, net=wide)
    before = condenser.data.detach().clone()
    assert condenser.iterate(0)["count"] == 10
    whole = condenser.gather()
    assert whole is not None and whole.features is not None
    assert whole.owner.tolist() == [c for c in range(10) for _ in range(IPC)] and whole.targets.shape == (20, 14)
    assert whole.features.shape[:2] == (1, 20 if scope == "sample" else 10)
    assert (condenser.data != before).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "feature", [FeatureConfig(), FeatureConfig(feat_lbd=0.1, lbd_contrast=0.05, feat_opt="sgd", lr_feat=0.1), None]
)
def test_a_stopped_run_goes_on_to_the_same_bits(world: World, feature: FeatureConfig | None, tmp_path: Path) -> None:
    def learn(name: str, stop: int | None) -> SyntheticSet:
        flag = StopFlag()

        def net(number: int) -> ImageNetwork:
            if number == stop:
                flag.number = signal.SIGTERM
            return network(number)

        condenser, run = make(world, feature, net=net, dtype=torch.float32), RunFolder(tmp_path / name, {}, world)
        learning_loop(condenser, run, flag, lambda found: 0.0, False)
        return load_synthetic(run.folder / "distilled_data" / "syn_data_4.pth")

    whole = learn("whole", None)
    for stop in (0, 2):
        with pytest.raises(Stopped):
            learn("parts", stop)
    again = learn("parts", None)
    assert torch.equal(again.data, whole.data)
    assert feature is None or (again.features is not None and again.features.equal(whole.features))  # type: ignore[arg-type]


def test_labels_with_a_relative_rate_move_alike_whatever_lambda(world: World) -> None:
    """As the matched gradients are nearly those of CE for a small lambda."""
    moves = []
    for lbd in (1e-4, 1e-6):
        f = FeatureConfig(lbd=lbd, feat_opt="sgd", lr_feat=0.1, lr_feat_rel=True)
        condenser = make(world, f)
        assert condenser.labels is not None
        before = condenser.labels.detach().clone()
        condenser.match(network().double(), 0)
        moves.append(condenser.labels.detach() - before)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-2, atol=1e-3 * float(moves[1].abs().max()))


@pytest.mark.parametrize(
    ("ipc", "loops"),
    [(1, (1, 1)), (2, (1, 1)), (4, (5, 10)), (9, (10, 50)), (10, (10, 50)), (48, (50, 10)), (500, (50, 10))],
)
def test_the_schedule_is_the_published_one_of_the_nearest_size(ipc: int, loops: tuple[int, int]) -> None:
    assert GradientConfig(ipc=ipc).loops == loops
    assert GradientConfig(ipc=ipc, outer_loop=3, inner_loop=0).loops == (3, 0)
