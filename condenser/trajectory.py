"""Trajectory matching: a student's steps on the synthetic set should end where an expert's on real data did (MTT:
Cazenavette et al., CVPR 2022), with the gradient of the whole unrolled student at the memory of one of its steps.

theta_{i+1} = theta_i - alpha grad l_i(theta_i),   L = |theta_T - target|^2 / |theta_0 - target|^2.
Only the flat vectors theta_i [P] are kept. With lambda_T = dL/dtheta_T, going back replays a step at a time:
lambda_i = lambda_{i+1} - alpha (grad^2 l_i) lambda_{i+1}, dL/d(leaf) = -alpha sum_i d<lambda_{i+1}, grad l_i>/d(leaf).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from condenser.gradient_matching import free
from condenser.second_order import SecondOrder

# (theta [P], step, part of the step's batch, *that part of every leaf's rows) -> scalar: the losses, summed, over the
# size of the batch, so that the micro-batches of a step add up. Every call with the same arguments does the same.
StepLoss = Callable[..., Tensor]
Batches = Sequence[Sequence[Tensor]]  # of every step, the rows [B] of every leaf that are its batch
Parts = Sequence[Sequence[slice]]  # the micro-batches of every step
Mode = Literal["exact", "tesla"]
GSAM_EPS = 1e-12  # published
FREED, HELD = 2.4, 1.15  # resident bytes for one of tensors that come and go, or stay: measured, glibc 2.36
SOFT_ZERO = 0.1  # of a step size's start value: where its distance from 0 begins to be felt


@dataclass(frozen=True)
class Match:
    """L, theta_T [P], and dL by (*leaves, alpha), or None where L is over the limit or not finite."""

    loss: float
    end: Tensor
    gradients: tuple[Tensor, ...] | None


def flat_parameters(net: nn.Module) -> Tensor:
    """A copy [P] of all parameters, in their order."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@torch.no_grad()
def set_parameters(net: nn.Module, theta: Tensor) -> None:
    """Copy theta [P] into the network (`vector_to_parameters` would train the vector on)."""
    for p, value in zip(net.parameters(), split_parameters(net, theta), strict=True):
        p.copy_(value)


def split_parameters(net: nn.Module, theta: Tensor) -> list[Tensor]:
    """Views of theta [P] in the shapes of the network's parameters."""
    shapes = [p.shape for p in net.parameters()]
    parts = theta.split([shape.numel() for shape in shapes])  # one node, whose gradient is one cat
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def flat_network(net: nn.Module, body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`body(net, *samples)` as a function (theta [P], *samples); only buffers are still read from the network."""
    call, values = free(net, [name for name, _ in net.named_parameters()], body)
    return lambda theta, *samples: call(dict(zip(values, split_parameters(net, theta), strict=True)), *samples)


def micro_batches(size: int, most: int) -> list[slice]:
    """A batch in as few parts as have at most `most` samples, of sizes as equal as can be."""
    count = -(-size // most)
    return [slice(i * size // count, (i + 1) * size // count) for i in range(count)]


def step_gradient(loss: StepLoss, theta: Tensor, step: int, part: slice, rows: Sequence[Tensor], graph: bool) -> Tensor:
    """Gradient [P] of a step's loss on a part of its batch by theta [P]; with a graph, to be differentiated once."""
    with SecondOrder():
        value = loss(theta, step, part, *rows)
    return torch.autograd.grad(value, theta, create_graph=graph)[0]


def match_trajectory(
    loss: StepLoss,
    theta: Tensor,
    target: Tensor,
    alpha: Tensor,
    leaves: Sequence[Tensor],  # at least one
    batches: Batches,
    parts: Parts,
    mode: Mode = "exact",  # tesla: first order, every theta_i a constant (Cui et al., ICML 2023, its lost 2 put back)
    keep: int = 0,  # last steps whose graphs are kept, not replayed
    limit: float = math.inf,
    total: Callable[[Tensor], Tensor] = torch.Tensor.detach,  # sum over ranks that share out the samples of a step
) -> Match:
    """Match of a student at theta [P] after len(parts) steps of size alpha [] with target [P]. Then
    `torch.autograd.backward((*leaves, alpha), found.gradients)`; ranks that share out samples sum gradients first."""

    def gradients(i: int, graph: bool) -> Iterator[Piece]:
        for part in parts[i]:
            places = [ids[part] for ids in batches[i]]
            rows = [leaf.detach()[ids].requires_grad_() for leaf, ids in zip(leaves, places, strict=True)]
            yield step_gradient(loss, path[i], i, part, rows, graph), rows, places

    path, graphs, steps, rate = [theta.detach().requires_grad_()], list[list[Piece]](), len(parts), alpha.detach()
    for i in range(steps):
        if i >= steps - keep:
            graphs.append(list(gradients(i, graph=True)))
        g = torch.zeros_like(theta)
        for piece, _, _ in graphs[-1] if graphs else gradients(i, graph=False):
            g += piece.detach()
        path.append((path[i].detach() - rate * total(g)).requires_grad_())
    end = path[-1].detach()
    gap, scale = end - target, (theta - target).square().sum()
    value = float(gap.square().sum() / scale)
    if not (math.isfinite(value) and value <= limit):
        return Match(value, end, None)
    adjoint, slope, sums = 2 / scale * gap, theta.new_zeros(()), [torch.zeros_like(leaf) for leaf in leaves]
    for i in reversed(range(steps)):
        goes_on = mode == "exact" and i > 0
        h = torch.zeros_like(theta)
        for g, rows, places in graphs.pop() if graphs else gradients(i, graph=True):
            slope -= adjoint @ g.detach()
            inputs = [*rows, path[i]] if goes_on else rows
            found = torch.autograd.grad(g, inputs, -rate * adjoint, allow_unused=True)
            for whole, ids, share in zip(sums, places, found, strict=False):
                if share is not None:
                    whole.index_add_(0, ids, share)
            if goes_on and found[-1] is not None:
                h += found[-1]
        if goes_on:
            adjoint = adjoint + total(h)
    return Match(value, end, (*sums, slope.to(alpha)))


# Gradient [P] of a micro-batch, the rows of the leaves that its graph goes through, and their places.
Piece = tuple[Tensor, list[Tensor], list[Tensor]]


class Live(TorchDispatchMode):
    """Counts bytes of tensors while it is entered: those alive `now` besides the given ones, and their `peak`."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.met, self.now, self.peak = WeakSet(tensor.untyped_storage() for tensor in given), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and meet the storages of what it returns."""
        found = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(found) if isinstance(t, Tensor)):
            if storage not in self.met:
                self.met.add(storage)
                self._count(storage.nbytes())
                finalize(storage, self._count, -storage.nbytes())
        return found

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Memory:
    """What `match_trajectory` needs in bytes besides its arguments (and a GPU's workspaces)."""

    steps: int
    count: int  # micro-batches a step
    theta: int  # of a vector of parameters, one for every step
    work: int  # of a micro-batch, while it is replayed
    graph: int  # of a micro-batch's gradient; one is part of the work

    @property
    def plain(self) -> int:
        """Bytes without kept graphs."""
        return self.work + self.steps * self.theta

    def peak(self, keep: int) -> int:
        """Bytes with `keep` graphs of steps kept."""
        return self.plain + max(keep * self.count - 1, 0) * self.graph

    def keep(self, budget: int) -> int:
        """How many kept steps fit into `budget` bytes; without micro-batches the first is free."""
        return min(self.steps, (max(budget - self.plain, 0) // self.graph + 1) // self.count)

    def resident(self) -> "Memory":
        """The same as bytes of a process on a CPU: glibc puts no aligned block into a hole of its own size."""
        theta, work, graph = int(HELD * self.theta), int(FREED * self.work), int(HELD * self.graph)
        return Memory(self.steps, self.count, theta, work, graph)


def trajectory_memory(
    loss: StepLoss, theta: Tensor, leaves: Sequence[Tensor], batches: Batches, parts: Parts, mode: Mode
) -> Memory:
    """Found by two steps of the largest micro-batch, whose values do not matter."""
    i, part = max(((i, part) for i, step in enumerate(parts) for part in step), key=lambda v: v[1].stop - v[1].start)
    zero, start = torch.zeros_like(theta), theta.detach().requires_grad_()
    with Live([theta, *leaves]) as run:
        match_trajectory(
            lambda w, _, part, *rows: loss(w, i, part, *rows), theta, zero, zero[0], leaves, [batches[i]] * 2,
            [[part]] * 2, mode,
        )  # fmt: skip
    with Live([theta, *leaves]) as one:
        rows = [leaf.detach()[ids[part]].requires_grad_() for leaf, ids in zip(leaves, batches[i], strict=True)]
        gradient = step_gradient(loss, start, i, part, rows, graph=True)
        graph = one.now
    del gradient
    return Memory(len(parts), max(map(len, parts)), theta.nbytes, run.peak - 2 * theta.nbytes, graph)


def step_size(raw: Tensor, start: float) -> Tensor:
    """A positive alpha for any raw: (raw + sqrt(raw^2 + 4 s^2)) / 2 with s = start / 10, so that raw moves alpha one to
    one (0.99 at start: published rates stay valid) until alpha is small."""
    s = SOFT_ZERO * start
    twice = torch.where(raw < 0, -raw, raw) + (raw.square() + 4 * s * s).sqrt()  # no cancellation for raw < 0
    return torch.where(raw < 0, 2 * s * s / twice, twice / 2)


def raw_step_size(alpha: float, start: float) -> float:
    """The raw value of a step size alpha > 0: inverse of `step_size`."""
    return alpha - (SOFT_ZERO * start) ** 2 / alpha


def gsam_direction(
    loss_grad: Callable[[Tensor], Tensor], w: Tensor, rho: float, alpha: float, adaptive: bool = True
) -> Tensor:
    """What to go down from w [P] (GSAM: Zhuang et al., ICLR 2022; FTD: Du et al., CVPR 2023): g_p - alpha g_perp, g_p
    at w + rho w^2 g / |w g| (not adaptive: rho g / |g|), g_perp what of g is normal to g_p. Both see one batch."""
    g = loss_grad(w)
    size = w if adaptive else torch.ones_like(w)
    p = loss_grad(w + rho * size.square() * g / ((size * g).norm() + GSAM_EPS))
    return p - alpha * (g - (g @ p) / (p @ p).clamp_min(GSAM_EPS**2) * p)


def start_window(
    iteration: int, lowest: int, current: int, highest: int, expansion_end: int, sequential: bool
) -> range:
    """Epochs lowest to highest - 1 at which a student may start (DATM: Guo et al., ICLR 2024); sequential: at first to
    current - 1, growing to the whole by iteration `expansion_end`."""
    if not sequential:
        return range(lowest, highest)
    return range(lowest, min(highest, current + (highest - current) * iteration // expansion_end))
