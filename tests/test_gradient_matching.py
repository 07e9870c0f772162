"""Gradient matching: all classes at once as one by one, the distance's closed forms, the labels' gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from condenser.feature_labels import FeatureForm, Pool, feature_of
from condenser.gradient_matching import (
    GradientDistance,
    class_gradients,
    encoder_names,
    feature_class_gradients,
    gradient_distance,
    label_gradients,
    matched_names,
)
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network

KINDS: tuple[GradientDistance, ...] = ("ours", "mse", "cos")
FORMS: list[tuple[FeatureForm, Pool]] = [("map", "avg"), ("channel", "avg"), ("channel", "max"), ("spatial", "avg")]
NETWORKS = [
    ({"norm_type": "group"}, 8),
    ({"norm_type": "instance"}, 16),
    ({"norm_type": "batch", "pooling": "max"}, 8),
    ({"norm_type": "layer", "activation": "swish"}, 8),
    ({"net_type": "resnet10_ap", "norm_type": "group"}, 8),
    ({"net_type": "alexnet", "norm_type": "none"}, 8),
    ({"net_type": "mlp", "norm_type": "none"}, 8),
    ({"net_type": "lenet", "norm_type": "none"}, 16),
]


def network(settings: dict[str, Any], size: int) -> ImageNetwork:
    return image_network(ImageNetworkConfig(width=8, **settings), 3, size, 4, 0, "test").double().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(classes: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    return draw(classes, count, 3, size, size), draw(classes, count, 4, seed=1).softmax(-1)


def like(net: nn.Module, names: Sequence[str], classes: int) -> list[Tensor]:
    return [draw(classes, *net.get_parameter(name).shape, seed=2 + i) for i, name in enumerate(names)]


def every(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters()]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert [f.shape for f in found] == [e.shape for e in expected]
    one, other = (torch.cat([t.detach().flatten() for t in side]) for side in (found, expected))
    assert other.norm() > 0
    return float((one - other).norm() / other.norm())


def published(net: nn.Module, names: Sequence[str], x: Tensor, targets: Tensor) -> list[Tensor]:
    """The loop over classes by plain autograd."""
    chosen = [net.get_parameter(name) for name in names]
    losses = [F.cross_entropy(net(rows).logits, y) for rows, y in zip(x, targets, strict=True)]
    classes = [torch.autograd.grad(loss, chosen, create_graph=True) for loss in losses]
    return [torch.stack(g) for g in zip(*classes, strict=True)]


@pytest.mark.parametrize("settings, size", NETWORKS, ids=lambda v: "-".join(v.values()) if isinstance(v, dict) else "")
def test_gradients_and_their_gradients_are_those_of_a_loop_over_classes(settings: dict[str, Any], size: int) -> None:
    net, (x, targets) = network(settings, size), data(2, 3, size)
    x, names = x.requires_grad_(), every(net)
    real = like(net, names, 2)
    expected = published(net, names, x, targets)
    pixels = torch.autograd.grad(gradient_distance(expected, real, "ours").sum(), x)
    for tile in (None, 2):
        found = class_gradients(net, names, x, targets, tile)
        assert error(found, expected) < 1e-12
        assert error(torch.autograd.grad(gradient_distance(found, real, "ours").sum(), x), pixels) < 1e-11


def test_the_real_side_has_no_graph_and_the_network_none_at_all() -> None:
    net, (x, targets) = network({"norm_type": "group"}, 8), data(2, 3, 8)
    names = every(net)[:2]
    for tile in (None, 2):
        with torch.no_grad():
            real = class_gradients(net, names, x.clone().requires_grad_(), targets, tile)
        assert not any(g.requires_grad for g in [*real, *class_gradients(net, names, x, targets, 2)])
        found = class_gradients(net, names, x.clone().requires_grad_(), targets, tile)
        gradient_distance(found, real, "mse").sum().backward()
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"norm_type": "group"}, {"norm_type": "batch", "pooling": "max"}])
def test_ten_classes_take_as_many_kernels_as_two(settings: dict[str, Any]) -> None:
    net, counts = network(settings, 8), []
    names, encoder = every(net), encoder_names(net)
    for classes in (2, 10):
        (x, targets), labels = data(classes, 3, 8), draw(classes, 3, 8)
        x = x.requires_grad_()
        with Count() as count:
            with torch.no_grad():
                real = class_gradients(net, names, x, targets)
            found = class_gradients(net, names, x, targets)
            torch.autograd.grad(gradient_distance(found, real, "ours").sum(), x)
            with torch.no_grad():
                found = feature_class_gradients(net, encoder, x, targets, labels, 0.1, "channel", "avg", None)
            label_gradients(net, encoder, x, found, 0.1, "channel", "avg", None)
        counts.append(count.ops)
    assert counts[0] == counts[1] > 0


def oracle(syn: list[np.ndarray[Any, Any]], real: list[np.ndarray[Any, Any]], kind: GradientDistance) -> float:
    """Of one class: gradients [*shape]."""

    def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
        return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6))

    if kind == "ours":
        pairs = [(s, r) for s, r in zip(syn, real, strict=True) if s.ndim > 1]
        return sum(cosine(s[i].ravel(), r[i].ravel()) for s, r in pairs for i in range(len(s)))
    a, b = (np.concatenate([g.ravel() for g in side]) for side in (syn, real))
    return float(((a - b) ** 2).sum()) if kind == "mse" else cosine(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_is_that_of_numpy_class_by_class(kind: GradientDistance) -> None:
    shapes = [(3, 2, 3, 3), (3,), (4, 2, 2), (5, 6)]
    syn, real = ([draw(2, *s, seed=seed + i) for i, s in enumerate(shapes)] for seed in (0, 10))
    expected = [oracle([g[c].numpy() for g in syn], [g[c].numpy() for g in real], kind) for c in range(2)]
    torch.testing.assert_close(gradient_distance(syn, real, kind), torch.tensor(expected, dtype=torch.float64))


def test_the_distance_has_its_hand_values() -> None:
    syn = [torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]]), torch.tensor([[5.0]])]
    real = [torch.tensor([[[6.0, 8.0], [0.0, -1.0], [0.0, 1.0]]]), torch.tensor([[1.0]])]
    values = [float(gradient_distance(syn, real, kind)) for kind in KINDS]
    assert values == pytest.approx([0 + 2 + 1, 9 + 16 + 9 + 2 + 16, 1 - 53 / (55 * 103) ** 0.5], abs=1e-5)


def test_ours_reads_no_one_dimensional_parameter_and_the_others_do() -> None:
    net = network({"norm_type": "group"}, 8)
    names = every(net)
    syn, real = like(net, names, 2), like(net, names[::-1], 2)[::-1]
    matched = matched_names(net, names, "ours")
    assert matched == ["blocks.0.0.weight", "blocks.1.0.weight", "blocks.2.0.weight", "head.weight"]
    few = [[g for g, name in zip(side, names, strict=True) if name in matched] for side in (syn, real)]
    assert torch.equal(gradient_distance(few[0], few[1], "ours"), gradient_distance(syn, real, "ours"))
    assert matched_names(net, names, "mse") == names
    for kind in ("mse", "cos"):
        assert not torch.equal(gradient_distance(few[0], few[1], kind), gradient_distance(syn, real, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_have_finite_derivatives_of_both_orders(kind: GradientDistance) -> None:
    values = torch.stack([torch.zeros(3, 2), draw(3, 2).float()]).requires_grad_()
    for real in (torch.zeros(2, 3, 2), torch.ones(2, 3, 2)):
        (first,) = torch.autograd.grad(gradient_distance([values], [real], kind).sum(), values, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), values, materialize_grads=True)
        assert first.isfinite().all() and second[0].isfinite().all()


def test_a_dead_unit_lets_the_others_learn() -> None:
    net, (x, targets) = network({"norm_type": "none", "depth": 1}, 8), data(2, 3, 8)
    with torch.no_grad():
        net.get_parameter("blocks.0.0.bias")[0] = -1e3
    x, names = x.requires_grad_(), every(net)
    found = class_gradients(net, names, x, targets)
    assert not found[0][:, 0].any()
    for kind in KINDS:
        (pixels,) = torch.autograd.grad(gradient_distance(found, like(net, names, 2), kind).sum(), x, retain_graph=True)
        assert pixels.isfinite().all() and pixels.any()


@pytest.mark.parametrize("form, pool", FORMS)
@pytest.mark.parametrize("layer_idx", [None, 1])
def test_feature_labels_enter_as_in_a_loop_and_learn_by_the_closed_form(
    form: FeatureForm, pool: Pool, layer_idx: int | None
) -> None:
    net, (x, targets) = network({"norm_type": "group"}, 16), data(2, 3, 16)
    names, lbd = encoder_names(net, layer_idx), 0.3
    rows = feature_of(net.with_map(x.flatten(0, 1), layer_idx)[1], form, pool).detach()
    labels = (rows + draw(*rows.shape)).unflatten(0, (2, 3)).requires_grad_()
    classes = []
    for one, y, label in zip(x, targets, labels, strict=True):
        output, maps = net.with_map(one, layer_idx)
        loss = F.cross_entropy(output.logits, y) + lbd * F.mse_loss(feature_of(maps, form, pool), label)
        classes.append(torch.autograd.grad(loss, [net.get_parameter(n) for n in names], create_graph=True))
    expected, real = [torch.stack(g) for g in zip(*classes, strict=True)], like(net, names, 2)
    plain = class_gradients(net, names, x, targets)
    for kind in KINDS:
        (double,) = torch.autograd.grad(gradient_distance(expected, real, kind).sum(), labels, retain_graph=True)
        for tile in (None, 2):
            with torch.no_grad():
                found = feature_class_gradients(net, names, x, targets, labels, lbd, form, pool, layer_idx, tile)
            assert error(found, expected) < 1e-12 and error(found, plain) > 1e-3
            found = [g.requires_grad_() for g in found]
            v = torch.autograd.grad(gradient_distance(found, real, kind).sum(), found, materialize_grads=True)
            closed = label_gradients(net, names, x, v, lbd, form, pool, layer_idx, tile)
            assert error([closed], [double]) < 1e-10


def test_the_encoder_is_what_comes_before_the_head() -> None:
    net = network({"net_type": "lenet", "norm_type": "none"}, 16)
    assert encoder_names(net) == [name for name in every(net) if not name.startswith("head.")]
    assert encoder_names(net, 1) == ["blocks.0.0.weight", "blocks.0.0.bias"]
