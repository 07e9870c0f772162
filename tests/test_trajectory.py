"""Trajectory matching: the replayed gradient is the unroll's at constant memory, and labels reach the trajectory."""

import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from condenser.feature_labels import FeatureForm, feature_of, labelled_loss
from condenser.trajectory import (
    Live,
    Match,
    Mode,
    Parts,
    StepLoss,
    flat_network,
    flat_parameters,
    gsam_direction,
    match_trajectory,
    micro_batches,
    raw_step_size,
    set_parameters,
    start_window,
    step_size,
    trajectory_memory,
)
from utils.augment import Augmentation, draw_augmentation
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.streams import generator

N, B, CLASSES, LBD, DEPTH = 9, 6, 3, 0.5, 2
FORMS: tuple[FeatureForm, ...] = ("map", "channel", "spatial")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(purpose: str = "test") -> ImageNetwork:
    settings = ImageNetworkConfig(width=4, depth=DEPTH, norm_type="group")
    return image_network(settings, 3, 8, CLASSES, 0, purpose).double()


def batch(step: int) -> Tensor:
    return torch.randperm(N, generator=generator(0, "batch", step))[:B]


def view(step: int) -> Augmentation:
    return draw_augmentation("color_crop_flip_scale", B, generator(0, "augmentation", step))


def batches(steps: int, leaves: int = 3) -> list[list[Tensor]]:
    return [[batch(step)] * leaves for step in range(steps)]


@dataclass
class Problem:
    net: ImageNetwork
    form: FeatureForm
    theta: Tensor
    target: Tensor
    leaves: list[Tensor]  # images, label logits, feature labels
    alpha: Tensor

    @property
    def loss(self) -> StepLoss:
        body = flat_network(self.net, self.sample_losses)

        def loss(theta: Tensor, step: int, part: slice, x: Tensor, y: Tensor, features: Tensor, *_: Tensor) -> Tensor:
            return body(theta, view(step).part(part)(x), y.softmax(1), features).sum() / B

        return loss

    def sample_losses(self, net: ImageNetwork, x: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        return labelled_loss(net, x, targets, labels, LBD, self.form, "avg", None)

    def match(self, steps: int, most: int = B, mode: Mode = "exact", keep: int = 0, limit: float = math.inf) -> Match:
        parts = [micro_batches(B, most)] * steps
        return match_trajectory(
            self.loss, self.theta, self.target, self.alpha, self.leaves, batches(steps), parts, mode, keep, limit=limit
        )


def problem(form: FeatureForm = "channel", alpha: float = 0.05) -> Problem:
    net, x = network(), draw(N, 3, 8, 8)
    theta, target = flat_parameters(net), flat_parameters(network("expert"))
    labels = feature_of(net.with_map(x)[1], form, "avg").detach()
    leaves = [x, draw(N, CLASSES, seed=1), labels + draw(*labels.shape, seed=2)]
    step = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    return Problem(net, form, theta, target, [leaf.requires_grad_() for leaf in leaves], step)


def student(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The network written out: logits, last map."""
    for i in range(DEPTH):
        name = f"blocks.{i}"
        x = F.conv2d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], padding=1)
        x = F.avg_pool2d(F.relu(F.group_norm(x, 4, p[f"{name}.1.weight"], p[f"{name}.1.bias"])), 2)
    return F.linear(x.flatten(1), p["head.weight"], p["head.bias"]), x


def unroll(p: Problem, steps: int, first_order: bool = False) -> tuple[float, Tensor, tuple[Tensor, ...]]:
    """Loss, last parameters, and gradients by (*leaves, alpha), autograd going through all steps at once; first order:
    every gradient is taken at constants."""
    theta = {name: value.detach().requires_grad_() for name, value in p.net.named_parameters()}
    x, y, features = p.leaves
    for step in range(steps):
        which = batch(step)
        at = {name: w.detach().requires_grad_() for name, w in theta.items()} if first_order else theta
        logits, maps = student(at, view(step)(x[which]))
        found = {"map": maps, "channel": maps.mean((2, 3)), "spatial": maps.mean(1)}[p.form]
        loss = F.cross_entropy(logits, y[which].softmax(1)) + LBD * F.mse_loss(found, features[which])
        slopes = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        theta = {name: w - p.alpha * g for (name, w), g in zip(theta.items(), slopes, strict=True)}
    end = torch.cat([w.flatten() for w in theta.values()])
    value = (end - p.target).square().sum() / (p.theta - p.target).square().sum()
    return value.item(), end.detach(), torch.autograd.grad(value, (*p.leaves, p.alpha))


def gradients(found: Match) -> tuple[Tensor, ...]:
    assert found.gradients is not None
    return found.gradients


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "form, steps, most, keep",
    [("map", 1, B, 0), ("spatial", 1, 1, 1), ("channel", 5, B, 0), ("map", 5, 4, 2), ("spatial", 5, 1, 9),
     ("spatial", 20, B, 0), ("channel", 20, 4, 0), ("map", 20, B, 20), ("channel", 40, 4, 3)],
)  # fmt: skip
def test_exact_gradients_are_those_of_the_unroll(form: FeatureForm, steps: int, most: int, keep: int) -> None:
    p = problem(form)
    found, (value, end, expected) = p.match(steps, most, keep=keep), unroll(p, steps)
    assert found.loss == pytest.approx(value, rel=1e-12) and error(found.end, end) < 1e-12
    errors = [error(one, other) for one, other in zip(gradients(found), expected, strict=True)]
    assert max(errors) < 1e-12


def test_tesla_takes_every_theta_for_a_constant() -> None:
    p = problem()
    for steps, most in ((1, B), (20, 4)):
        exact, tesla = gradients(p.match(steps)), gradients(p.match(steps, most, "tesla"))
        for one, other in zip(tesla, unroll(p, steps, first_order=True)[2], strict=True):
            assert error(one, other) < 1e-12
        apart = [error(one, other) for one, other in zip(tesla, exact, strict=True)]
        assert max(apart) < 1e-12 if steps == 1 else min(apart) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_feature_labels_reach_the_trajectory(form: FeatureForm) -> None:
    p = problem(form)
    before = p.match(3)
    assert gradients(before)[2].norm() > 1e-3 * gradients(before)[0].norm()
    with torch.no_grad():
        for w in p.net.parameters():
            w.normal_()
    after = p.match(3)  # every term reads theta, none the network's own parameters
    assert after.loss == before.loss and torch.equal(after.end, before.end)
    assert all(torch.equal(one, other) for one, other in zip(gradients(after), gradients(before), strict=True))
    with torch.no_grad():
        p.leaves[2] += 1
    assert error(p.match(3).end, before.end) > 1e-4


def test_samples_that_no_step_uses_get_zeros() -> None:
    p = problem()
    unused = sorted(set(range(N)) - set(batch(0).tolist()))
    extra = torch.ones(2, dtype=torch.float64, requires_grad=True)
    which = [[*batches(1)[0], torch.zeros(B, dtype=torch.long)]]
    found = match_trajectory(p.loss, p.theta, p.target, p.alpha, [*p.leaves, extra], which, [[slice(0, B)]])
    for slope in gradients(found)[:3]:
        assert not slope[unused].any() and slope[batch(0)].flatten(1).any(1).all()
    assert torch.equal(gradients(found)[3], torch.zeros(2, dtype=torch.float64))


def test_gradients_go_on_to_what_leaves_and_step_size_are_made_of() -> None:
    p = problem()
    raw = torch.tensor(raw_step_size(0.05, 0.02), dtype=torch.float64, requires_grad=True)
    alpha = step_size(raw, 0.02)
    found = match_trajectory(p.loss, p.theta, p.target, alpha, p.leaves, batches(3), [[slice(0, B)]] * 3)
    torch.autograd.backward((*p.leaves, alpha), gradients(found))
    expected = unroll(p, 3)[2]
    for leaf, other in zip(p.leaves, expected, strict=False):
        assert leaf.grad is not None and error(leaf.grad, other) < 1e-12
    e = 1e-6
    slope = (step_size(raw + e, 0.02) - step_size(raw - e, 0.02)).item() / (2 * e)
    assert raw.grad is not None and raw.grad.item() == pytest.approx(expected[3].item() * slope, rel=1e-8)
    assert p.theta.grad is None and not any(w.grad is not None for w in p.net.parameters())


def test_the_loss_is_one_where_nothing_moved_and_zero_at_the_target() -> None:
    p = problem(alpha=0.0)
    assert p.match(4).loss == 1.0 and torch.equal(p.match(4).end, p.theta)
    p.alpha = torch.tensor(0.05, dtype=torch.float64)
    p.target = p.match(4).end
    assert p.match(4).loss == 0.0 and not any(slope.any() for slope in gradients(p.match(4)))


def test_a_loss_over_the_limit_or_not_finite_has_no_gradient() -> None:
    p = problem()
    value = p.match(2).loss
    assert p.match(2, limit=value * 1.01).gradients is not None and p.match(2, limit=value * 0.99).gradients is None
    for alpha in (1e200, float("nan")):
        p.alpha = torch.tensor(alpha, dtype=torch.float64)
        assert not math.isfinite(p.match(2).loss) and p.match(2).gradients is None


def test_ranks_that_share_out_the_samples_of_a_step_find_the_same() -> None:
    own = [problem(), problem()]
    shares: list[Parts] = [[[slice(0, 2)]] * 5, [[slice(2, 4), slice(4, B)]] * 5]
    barrier, values, found = threading.Barrier(2), [torch.zeros(0)] * 2, dict[int, Match]()

    def run(rank: int) -> None:
        def total(value: Tensor) -> Tensor:
            values[rank] = value
            barrier.wait()
            whole = values[0] + values[1]
            barrier.wait()
            return whole

        p = own[rank]
        which = batches(5)
        found[rank] = match_trajectory(
            p.loss, p.theta, p.target, p.alpha, p.leaves, which, shares[rank], keep=2, total=total
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    value, end, expected = unroll(own[0], 5)
    assert found[0].loss == found[1].loss == pytest.approx(value, rel=1e-12) and torch.equal(found[0].end, found[1].end)
    for one, two, other in zip(gradients(found[0]), gradients(found[1]), expected, strict=True):
        assert error(one + two, other) < 1e-12


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_peak(work: Callable[[], Any]) -> int:
    """Most bytes that autograd held for later at once."""
    now = peak = 0

    def drop(size: int) -> None:
        nonlocal now
        now -= size

    def pack(tensor: Tensor) -> Held:
        nonlocal now, peak
        held = Held(tensor.detach())  # an output with its graph would hold itself
        now += tensor.nbytes
        peak = max(peak, now)
        weakref.finalize(held, drop, tensor.nbytes)
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        work()
    return peak


@pytest.mark.parametrize("mode", ["exact", "tesla"])
def test_what_autograd_holds_does_not_grow_with_the_steps_and_shrinks_with_micro_batches(mode: Mode) -> None:
    p = problem()
    four, sixteen, small = (
        saved_peak(partial(p.match, steps, most, mode)) for steps, most in ((4, B), (16, B), (16, 1))
    )
    assert four == sixteen > 1.5 * small
    plain = [saved_peak(partial(unroll, p, steps)) for steps in (4, 16)]
    assert plain[1] > 3.5 * plain[0] > 7 * four


def test_live_bytes_are_those_of_storages() -> None:
    given = torch.zeros(100)
    with Live([given]) as live:
        a = given.view(10, 10) + 1
        b = a[:5].T.double()
        assert live.now == live.peak == 400 + 400
        a.add_(1)
        del a
        c = (b + 1).relu()  # b + 1 is gone after
    assert live.now == b.nbytes + c.nbytes == 800 and live.peak == 1200


@pytest.mark.parametrize("most, mode", [(B, "exact"), (2, "exact"), (4, "tesla")])
def test_the_memory_estimate_is_the_peak_of_the_whole_run(most: int, mode: Mode) -> None:
    p, parts = problem(), [micro_batches(B, most)] * 8
    memory = trajectory_memory(p.loss, p.theta, p.leaves, batches(8), parts, mode)
    for keep in (0, 1, 4, 8):
        with Live([p.theta, p.target, *p.leaves]) as live:
            p.match(8, most, mode, keep)
        assert memory.peak(keep) == pytest.approx(live.peak, rel=0.12)
        assert memory.keep(memory.peak(keep)) == max(keep, int(most == B))
    assert memory.keep(10**9) == 8 and memory.keep(memory.peak(4) - 1) == 3


def test_micro_batches_cover_a_batch_in_near_equal_parts() -> None:
    for size, most in ((7, 3), (6, 6), (5, 9), (100, 32), (3, 1)):
        parts = micro_batches(size, most)
        sizes = [len(range(size)[part]) for part in parts]
        assert [i for part in parts for i in range(size)[part]] == list(range(size))
        assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and len(parts) == math.ceil(size / most)


def test_flat_parameters_are_copies_in_both_directions() -> None:
    net, x = network(), draw(2, 3, 8, 8)
    theta, before = flat_parameters(net), net(x).logits
    kept = theta.clone()
    assert torch.equal(theta, torch.nn.utils.parameters_to_vector(net.parameters()))
    with torch.no_grad():
        for w in net.parameters():
            w.zero_()
    assert torch.equal(theta, kept) and not net(x).logits.any()
    assert torch.equal(flat_network(net, lambda net, x: net(x).logits)(theta, x), before)
    set_parameters(net, theta)
    assert torch.equal(net(x).logits, before)
    with torch.no_grad():
        for w in net.parameters():
            w.zero_()
    assert torch.equal(theta, kept)


@pytest.mark.parametrize("start", [1e-3, 0.01, 0.5])
def test_a_step_size_is_positive_and_moves_as_its_raw_value_does(start: float) -> None:
    for alpha in (start, start / 100, 50 * start):
        raw = torch.tensor(raw_step_size(alpha, start), dtype=torch.float64)
        assert step_size(raw, start).item() == pytest.approx(alpha, rel=1e-9)
    for raw in torch.tensor([-1e9, -10.0, -start, -1e-30, 0.0, 1e-30, start, 10.0, 1e9]):
        raw.requires_grad_()
        found = step_size(raw, start)
        (slope,) = torch.autograd.grad(found, raw)
        assert 0 < found.item() < math.inf and 0 < slope.item() <= 1
    raw = torch.tensor(raw_step_size(start, start), dtype=torch.float64, requires_grad=True)
    step_size(raw, start).backward()
    assert raw.grad is not None and 0.985 < raw.grad.item() < 1


def quadratic() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    a = draw(5, 5, seed=3)
    return lambda w: a @ a.T @ w, draw(5, seed=4)


def test_gsam_has_asam_sam_and_sgd_as_its_limits() -> None:
    slope, w = quadratic()
    g, rho = slope(w), 0.3
    assert torch.equal(gsam_direction(slope, w, 0.0, 0.7), g)
    asam = w + rho * w.square() * g / (w * g).norm()
    torch.testing.assert_close(gsam_direction(slope, w, rho, 0.0), slope(asam), rtol=1e-10, atol=0)
    sam = w + rho * g / g.norm()
    torch.testing.assert_close(gsam_direction(slope, w, rho, 0.0, adaptive=False), slope(sam), rtol=1e-10, atol=0)


def test_gsam_goes_against_what_of_the_gradient_is_normal_to_the_perturbed_one() -> None:
    slope, w = quadratic()
    places: list[Tensor] = []

    def watched(at: Tensor) -> Tensor:
        places.append(at)
        return slope(at)

    found = gsam_direction(watched, w, 0.3, 0.4)
    g, p = (slope(v).numpy() for v in places)
    assert ((places[1] - w) / w).norm().item() == pytest.approx(0.3)  # ASAM's ball, scaled by |w|
    cosine = g @ p / (np.linalg.norm(g) * np.linalg.norm(p))
    normal = g - cosine * np.linalg.norm(g) * p / np.linalg.norm(p)
    np.testing.assert_allclose(found.numpy(), p - 0.4 * normal, rtol=1e-10)
    assert abs((p - found.numpy()) @ p) < 1e-10 * (p @ p)
    assert not gsam_direction(torch.zeros_like, w, 0.3, 0.4).any()


def test_the_window_of_starts_grows_to_the_whole() -> None:
    def window(iteration: int) -> range:
        return start_window(iteration, 2, 10, 20, 1000, sequential=True)

    assert window(0) == range(2, 10) and window(99) == range(2, 10) and window(100) == range(2, 11)
    assert window(999) == range(2, 19) and window(1000) == window(10**6) == range(2, 20)
    assert start_window(0, 40, 50, 60, 1000, sequential=False) == range(40, 60)
