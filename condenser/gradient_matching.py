"""Gradients of every class's training loss, and their distance (DC: Zhao, Mopuri & Bilen, ICLR 2021).

A gradient is a list of one tensor [K, *shape] a parameter for K classes, by either of two ways with equal values.
`tile` None: all classes in one vmap, as many kernels as for one class. A number: class by class, `tile` samples at a
time, so that a CPU's cache holds their maps; under vmap weight gradients become grouped convolutions, slow on a CPU.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from condenser.feature_labels import FeatureForm, Pool, feature_of, labelled_loss
from utils.image_networks import ImageNetwork
from utils.losses import task_loss

GradientDistance = Literal["ours", "mse", "cos"]
Parameters = dict[str, Tensor]
EPS = 1e-6  # published: added to |a||b|


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - <a, b> / (|a||b| + EPS) of rows [..., D]: [...]; its derivatives are finite, a length of 0 being constant."""
    squares = [row.square().sum(-1) for row in (a, b)]
    one, other = (s.masked_fill(s == 0, 1).sqrt().masked_fill(s == 0, 0) for s in squares)
    return 1 - (a * b).sum(-1) / (one * other + EPS)


def gradient_distance(syn: Sequence[Tensor], real: Sequence[Tensor], kind: GradientDistance) -> Tensor:
    """Distance [K] of gradients [K, *shape]. ours: `cosine_distance` summed over the rows (outputs) of all weights, 1-D
    parameters left out; mse: squared error, summed; cos: `cosine_distance` of all parameters as one vector."""
    if kind == "ours":
        pairs = [(s.flatten(2), r.flatten(2)) for s, r in zip(syn, real, strict=True) if s.ndim > 2]
        return torch.stack([cosine_distance(s, r).sum(1) for s, r in pairs]).sum(0)
    one, other = (torch.cat([g.flatten(1) for g in side], 1) for side in (syn, real))
    return (one - other).square().sum(1) if kind == "mse" else cosine_distance(one, other)


def encoder_names(net: ImageNetwork, layer_idx: int | None = None) -> list[str]:
    """Names of all parameters before the head, or only of blocks 1 to `layer_idx`, which alone move that map."""
    part = tuple(f"blocks.{i}." for i in range(layer_idx)) if layer_idx else ("blocks.", "join.")
    return [name for name, _ in net.named_parameters() if name.startswith(part)]


def matched_names(net: nn.Module, names: Sequence[str], kind: GradientDistance) -> list[str]:
    """Those of `names` that `gradient_distance` reads: ours none of 1-D parameters."""
    return [name for name in names if kind != "ours" or net.get_parameter(name).ndim > 1]


def class_gradients(
    net: nn.Module, names: Sequence[str], x: Tensor, targets: Tensor, tile: int | None = None
) -> list[Tensor]:
    """Gradients [K, *shape] of the mean cross-entropy of each class's x [K, n, C, H, W], targets [K, n, classes].

    They have a graph to x where it needs one, never to the network: differentiate by `torch.autograd.grad`."""

    def losses(net: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        return task_loss(net(x).logits, targets, multilabel=False)

    return _gradients(*free(net, names, losses), (x, targets), tile)


def feature_class_gradients(
    net: ImageNetwork,
    names: Sequence[str],
    x: Tensor,
    targets: Tensor,
    labels: Tensor,
    lbd: float,
    form: FeatureForm,
    pool: Pool,
    layer_idx: int | None,
    tile: int | None = None,
) -> list[Tensor]:
    """As `class_gradients`, of CE + lbd * MSE(phi(E_L(x)), F) with F = labels [K, n, *form], its graph also to F."""

    def losses(net: ImageNetwork, x: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        return labelled_loss(net, x, targets, labels, lbd, form, pool, layer_idx)

    return _gradients(*free(net, names, losses), (x, targets, labels), tile)


def label_gradients(
    net: ImageNetwork,
    names: Sequence[str],
    x: Tensor,
    v: Sequence[Tensor],
    lbd: float,
    form: FeatureForm,
    pool: Pool,
    layer_idx: int | None,
    tile: int | None = None,
) -> Tensor:
    """dD/dF [K, n, *form] for v = dD/dg [K, *shape], g by `feature_class_gradients`, without a second backward pass.

    g is affine in F: dD/dF = -(2 lbd / N) J v, N the elements of a class's F, J = dphi(E_L(x)) / d(parameters)."""

    def features(net: ImageNetwork, x: Tensor) -> Tensor:
        return feature_of(net.with_map(x, layer_idx)[1], form, pool)

    call, values = free(net, names, features)

    def along(x: Tensor, *v: Tensor) -> Tensor:
        return jvp(lambda values: call(values, x), (values,), (dict(zip(values, v, strict=True)),))[1]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's rules for jvp still use its deprecated torch.jit
        if tile is None:
            found = vmap(along)(x, *v)
        else:
            classes = zip(x, *v, strict=True)
            found = torch.stack([torch.cat([along(part, *w) for part in rows.split(tile)]) for rows, *w in classes])
        return found * (-2 * lbd / found[0].numel())


class Body(nn.Module):
    """`body(net, *samples)` as the `forward` that torch's functional call wants."""

    def __init__(self, net: nn.Module, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.body = net, body

    def forward(self, *samples: Tensor) -> Tensor:
        """What the body says."""
        return self.body(self.net, *samples)


def free(net: nn.Module, names: Sequence[str], body: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Parameters]:
    """`body(net, *samples)` as a function (named parameters, *samples), and those parameters' values."""
    values = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    module = Body(net, body)
    return (
        lambda chosen, *samples: functional_call(module, {**values, **chosen}, samples),
        {f"net.{name}": values[f"net.{name}"] for name in names},
    )


def _gradients(
    losses: Callable[..., Tensor], values: Parameters, samples: tuple[Tensor, ...], tile: int | None
) -> list[Tensor]:
    # of the mean of losses [n] of each class of `samples` [K, n, ...]
    if tile is None:
        found = vmap(grad(lambda *args: losses(*args).mean()), in_dims=(None, *[0] * len(samples)))(values, *samples)
        return list(found.values())
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in samples)
    leaves = [p.requires_grad_() for p in values.values()]
    classes = []
    with torch.enable_grad():
        for rows in zip(*samples, strict=True):
            sums = [torch.zeros_like(p) for p in leaves]
            for part in zip(*(row.split(tile) for row in rows), strict=True):
                mean = losses(values, *part).sum() / len(rows[0])
                sums = [a + b for a, b in zip(sums, torch.autograd.grad(mean, leaves, create_graph=graph), strict=True)]
            classes.append(sums)
    return [torch.stack(g) for g in zip(*classes, strict=True)]
