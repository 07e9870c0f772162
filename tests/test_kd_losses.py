"""Distillation losses against slow numpy loops, closed forms and invariances."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import ConfigError
from kd.losses import (
    LossConfig,
    distillation_loss,
    dkd_rows,
    kd_loss_with_lskd,
    multi_scale_distillation_with_lskd,
    nkd_rows,
    normalize_logit,
    suggested_temperature,
)
from utils.losses import kl_rows

Array = np.ndarray[Any, np.dtype[Any]]
BASES = ["kd", "dkd", "nkd"]
B, K, N, T = 5, 6, 5, 2.5
SETTINGS = {"temperature": T, "alpha": 0.7, "beta": 3.0, "gamma": 1.3}


def logits(seed: int = 0, shape: tuple[int, ...] = (B, K, N), scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels() -> Tensor:
    return torch.arange(B) % K


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def kl(p: Array, q: Array) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def slow_z(z: Array, count: int) -> Array:
    mean = sum(z) / len(z)
    return (z - mean) / (math.sqrt(sum((a - mean) ** 2 for a in z) / count) + 1e-7)


def slow_row(base: str, s: Array, t: Array, y: int, temperature: float, whole: bool = False) -> float:
    p, q = softmax(t / temperature), softmax(s / temperature)
    if base == "kd":
        return temperature**2 * kl(p, q)
    rest = [k for k in range(len(s)) if k != y or whole]
    p_rest, q_rest = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
    if base == "dkd":
        binary = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        return temperature**2 * (SETTINGS["alpha"] * binary + SETTINGS["beta"] * kl(p_rest, q_rest))
    cross = -sum(a * math.log(b) for a, b in zip(p_rest, q_rest, strict=True))
    return -softmax(t)[y] * math.log(softmax(s)[y]) + SETTINGS["gamma"] * temperature**2 * cross


def slow_rows(
    base: str, s: Tensor, t: Tensor, y: Tensor, standardise: bool, count: int = K - 1, whole: bool = False
) -> Array:
    """[B, N]"""
    rows = np.zeros((s.shape[0], s.shape[2]))
    for b, n in np.ndindex(*rows.shape):
        u, v = s[b, :, n].numpy(), t[b, :, n].numpy()
        if standardise:
            u, v = slow_z(u, count), slow_z(v, count)
        rows[b, n] = slow_row(base, u, v, int(y[b]), T, whole)
    return rows


def slow_same(t: Tensor, y: Tensor, rule: str) -> Array:
    said = t.numpy().argmax(1)
    same = np.ones(said.shape, dtype=bool)
    for b, n in np.ndindex(*said.shape):
        right, right_whole = said[b, n] == int(y[b]), said[b, 0] == int(y[b])
        same[b, n] = right == right_whole if rule == "correctness" else said[b, n] == said[b, 0]
    return same


def core(**changes: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    settings = LossConfig.model_validate({**SETTINGS, **changes})
    return lambda s, t, y: distillation_loss(s, t, y, settings)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_loss_of_a_row_is_its_definition(base: str, standardise: bool) -> None:
    s, t, y = logits(), logits(1), labels()
    expected = slow_rows(base, s, t, y, standardise).mean()
    found = core(base=base, standardise=standardise, weight_rule="none")(s, t, y)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_deviation_divides_by_k_minus_1_or_by_k() -> None:
    s, t, y = logits(), logits(1), labels()
    expected = slow_rows("kd", s, t, y, True, count=K).mean()
    found = core(deviation="population", weight_rule="none")(s, t, y)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    rows = normalize_logit(logits(2, (4, K)), "population")
    torch.testing.assert_close(rows.square().mean(1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalize_logit(s.mT).std(-1), torch.ones(B, N, dtype=torch.float64), atol=1e-6, rtol=0)


def test_eps_is_added_to_the_deviation_itself() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)  # mean 2, deviation 1
    torch.testing.assert_close(normalize_logit(z, eps=0.25), torch.tensor([[-0.8, 0.0, 0.8]], dtype=torch.float64))


def test_kd_is_dkd_with_the_rest_weighed_by_its_probability() -> None:
    s, t, y = logits(0, (B, K)), logits(1, (B, K)), labels()
    rest = 1 - (t / T).softmax(1)[torch.arange(B), y]
    parts = dkd_rows(s, t, y, 1.0, 0.0, T) + rest * dkd_rows(s, t, y, 0.0, 1.0, T)
    torch.testing.assert_close(kl_rows(s, t, T), parts)


def test_nkd_is_least_where_the_student_agrees_within_the_rest() -> None:
    t, y = logits(1, (B, K)), labels()
    s = t.clone().requires_grad_()
    (nkd_rows(s, t, y, 1.0, T) - nkd_rows(s, t, y, 0.0, T)).sum().backward()
    torch.testing.assert_close(s.grad, torch.zeros_like(t))


def test_a_learned_temperature_of_nkd_sees_the_student_and_not_the_teacher_s_entropy() -> None:
    s, t, y = logits(1, (B, K)).requires_grad_(), logits(2, (B, K)), labels()
    settings = LossConfig(base="nkd", temperature=T)

    def slopes(student: Tensor, learned: bool) -> tuple[Tensor, ...]:
        tau = torch.full((1,), T, requires_grad=True)
        loss = distillation_loss(student[..., None], t[..., None], y, settings, tau if learned else None)
        return torch.autograd.grad(loss, (student, tau) if learned else (student,))

    torch.testing.assert_close(slopes(s, True)[0], slopes(s, False)[0])
    assert float(slopes(t.clone().requires_grad_(), True)[1]) == pytest.approx(
        0, abs=1e-5
    )  # nothing left to tell apart


def planted() -> tuple[Tensor, Tensor]:
    """Two samples of class 0; the teacher says [0, 0, 1, 2, 0] and [1, 1, 2, 0, 3] in their regions."""
    said = torch.tensor([[0, 0, 1, 2, 0], [1, 1, 2, 0, 3]])
    return 4 * torch.nn.functional.one_hot(said, K).mT + logits(1, (2, K, N), 0.1), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("none", [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        ("correctness", [[1, 1, 3, 3, 1], [1, 1, 1, 3, 1]]),
        ("class", [[1, 1, 3, 3, 1], [1, 1, 3, 3, 3]]),
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_regions_wrong_in_another_way_count_by_the_rule(base: str, rule: str, weights: list[list[int]]) -> None:
    (t, y), s = planted(), logits(0, (2, K, N))
    expected = (slow_rows(base, s, t, y, True) * np.array(weights)).mean()
    found = core(base=base, weight_rule=rule, complement_weight=3.0)(s, t, y)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", ["correctness", "class"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "group_mean"])
def test_reductions_are_their_loops(reduction: str, rule: str) -> None:
    s, t, y = logits(), logits(1), labels()
    rows, same = slow_rows("kd", s, t, y, False), slow_same(t, y, rule)
    assert 0 < same.sum() < same.size
    weighed = rows * np.where(same, 1, 2)
    expected = {
        "mean": weighed.sum() / (B * N),
        "sum": weighed.sum() / B,
        "group_mean": rows[same].mean() + rows[~same].mean(),
    }[reduction]
    found = core(standardise=False, reduction=reduction, weight_rule=rule)(s, t, y)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_an_empty_group_adds_nothing() -> None:
    s, t, y = logits(shape=(B, K, 1)), logits(1, (B, K, 1)), labels()
    assert core(reduction="group_mean")(s, t, y) == core(reduction="mean")(s, t, y)


def public_nkd(s: Tensor, t: Tensor, y: Tensor, standardise: bool) -> float:
    rows = slow_rows("nkd", s, t, y, standardise, whole=True)
    return float((rows * np.where(slow_same(t, y, "correctness"), 1, 2)).mean())


def public_kd_lskd(s: Tensor, t: Tensor, y: Tensor) -> float:
    regions = s.shape[2]
    rows = slow_rows("kd", s, t, y, True).T.reshape(-1)  # row r = region * B + sample
    said, target = t.numpy().argmax(1).T.reshape(-1), np.tile(y.numpy(), regions)
    consistent = np.zeros(len(rows), dtype=bool)
    for i in range(B):
        for r in range(i * regions, (i + 1) * regions):
            consistent[r] = said[r] == target[r] if said[i] == y[i] else said[r] != target[r]
    groups = [rows[consistent], rows[~consistent]]
    return float(sum(group.mean() for group in groups if len(group)))


def public_dkd_lskd(s: Tensor, t: Tensor, y: Tensor) -> float:
    weighed = slow_rows("dkd", s, t, y, True) * np.where(slow_same(t, y, "correctness"), 1, 2)
    return float(weighed.sum() if s.shape[2] > 1 else weighed.mean())


@pytest.mark.parametrize("regions", [1, N])
@pytest.mark.parametrize("seed", range(3))
def test_public_variants_are_reproduced_with_their_faults(regions: int, seed: int) -> None:
    s, t, y = logits(2 * seed)[..., :regions], logits(2 * seed + 1)[..., :regions], labels()
    t[torch.arange(0, B, 2), y[::2]] += 4  # a teacher that is right on some
    for standardise in (False, True):
        found = core(base="nkd", compat="sdd_nkd", standardise=standardise)(s, t, y)
        assert found.item() == pytest.approx(public_nkd(s, t, y, standardise), rel=1e-12)
    assert core(compat="sdd_kd_lskd")(s, t, y).item() == pytest.approx(public_kd_lskd(s, t, y), rel=1e-12)
    found = core(base="dkd", compat="sdd_dkd_lskd")(s, t, y)
    assert found.item() == pytest.approx(public_dkd_lskd(s, t, y), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"compat": "sdd_nkd"}, "base is kd"),
        ({"compat": "sdd_kd_lskd", "base": "dkd"}, "base is dkd"),
        ({"compat": "sdd_dkd_lskd", "base": "dkd", "standardise": False}, "standardise is false"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        LossConfig.model_validate(changes)


def test_named_functions_have_the_stated_defaults() -> None:
    s, t, y = logits(), logits(1), labels()
    rows, same = slow_rows("kd", s, t, y, True), slow_same(t, y, "correctness")
    found = multi_scale_distillation_with_lskd(s, t, y, T)
    assert found.shape == () and found.item() == pytest.approx((rows * np.where(same, 1, 2)).mean(), rel=1e-12)
    whole = kd_loss_with_lskd(s[..., 0], t[..., 0], T)
    assert whole.shape == () and whole.item() == pytest.approx(rows[:, 0].mean(), rel=1e-12)
    defaults = {name: p.default for name, p in inspect.signature(normalize_logit).parameters.items()}
    assert (defaults["deviation"], defaults["eps"]) == ("sample", 1e-7)


def test_gradient_of_lskd_is_the_closed_form_and_moves_neither_mean_nor_scale() -> None:
    z, t = logits(0, (B, K)).requires_grad_(), logits(1, (B, K))
    kl_rows(normalize_logit(z), normalize_logit(t), T).sum().backward()
    assert z.grad is not None
    c = z.detach() - z.detach().mean(1, keepdim=True)
    spread, eps = z.detach().std(1, keepdim=True), 1e-7
    u, v = c / (spread + eps), (t - t.mean(1, keepdim=True)) / (t.std(1, keepdim=True) + eps)
    g = T * ((u / T).softmax(1) - (v / T).softmax(1))
    along = (g * c).sum(1, keepdim=True) * c / ((spread + eps) ** 2 * (K - 1) * spread)
    torch.testing.assert_close(z.grad, (g - g.mean(1, keepdim=True)) / (spread + eps) - along)
    torch.testing.assert_close(z.grad.sum(1), torch.zeros(B, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((z.grad * c).sum(1), torch.zeros(B, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", BASES)
def test_standardised_losses_ignore_shift_and_scale_of_either_side(base: str) -> None:
    s, t, y, loss = logits(), logits(1), labels(), core(base=base)
    shift, scale = logits(2, (B, 1, N), 50.0), logits(3, (B, 1, N)).abs() + 0.1
    expected = loss(s, t, y)
    torch.testing.assert_close(loss(scale * s + shift, t, y), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(s, scale * t + shift, y), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("base", BASES)
def test_order_of_samples_and_of_further_regions_does_not_matter(base: str) -> None:
    s, t, y, loss = logits(), logits(1), labels(), core(base=base)
    order, regions = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(loss(s[order], t[order], y[order]), loss(s, t, y))
    torch.testing.assert_close(loss(s[..., regions], t[..., regions], y), loss(s, t, y))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_differences(base: str, compat: bool) -> None:
    variant = {"kd": "sdd_kd_lskd", "dkd": "sdd_dkd_lskd", "nkd": "sdd_nkd"}[base] if compat else None
    loss = core(base=base, compat=variant)
    assert torch.autograd.gradcheck(lambda s: loss(s, logits(1), labels()), logits().requires_grad_())


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("dtype", "gap"), [(torch.float16, 6e4), (torch.bfloat16, 1e6), (torch.bfloat16, 3e38), (torch.float32, 1e6)]
)
def test_no_gap_of_low_precision_logits_overflows(base: str, standardise: bool, dtype: torch.dtype, gap: float) -> None:
    s, t, y = torch.zeros(B, K, N), torch.zeros(B, K, N), labels()
    s[:, 0], t[:, 1], s[:, 2], t[:, 0] = gap, gap, -gap, -gap
    student = s.to(dtype).requires_grad_()
    loss = core(base=base, standardise=standardise)(student, t.to(dtype), y)
    loss.backward()
    assert student.grad is not None
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


def test_rows_widen_16_bit_logits_themselves() -> None:
    s, t, y = logits(0, (B, K)).half(), logits(1, (B, K)).half(), labels()
    rows: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, b: kl_rows(a, b, T),
        lambda a, b: dkd_rows(a, b, y, 1.0, 2.0, T),
        lambda a, b: nkd_rows(a, b, y, 1.5, T),
        lambda a, b: normalize_logit(a) + normalize_logit(b),
    ]
    for function in rows:
        assert torch.equal(function(s, t), function(s.float(), t.float()))


def test_dkd_keeps_probabilities_that_underflow() -> None:
    gap, y = 2000.0, torch.tensor([0])
    s, t = torch.tensor([[gap, 0.0, 0.0]]), torch.zeros(1, 3)
    # T = 1: p_t = (1/3, 2/3), log p_s = (0, -gap + log 2)
    expected = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) + gap - math.log(2))
    assert dkd_rows(s, t, y, 1.0, 1.0, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_equal_student_logits_have_a_finite_gradient() -> None:
    s = torch.zeros(B, K, N, requires_grad=True)
    core()(s, logits(1).float(), labels()).backward()
    assert s.grad is not None and s.grad.isfinite().all()


def test_losses_are_those_of_float64_in_float32() -> None:
    s, t, y = logits(), logits(1), labels()
    for base in BASES:
        found = core(base=base)(s.float(), t.float(), y)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(core(base=base)(s, t, y).item(), rel=1e-5)


@pytest.mark.parametrize("base", ["dkd", "nkd"])
def test_two_classes_are_refused_where_one_would_be_the_rest(base: str) -> None:
    s, y = logits(shape=(B, 2, N)), torch.zeros(B, dtype=torch.long)
    with pytest.raises(ConfigError, match=f"{base}: 2 classes.*take kd"):
        core(base=base)(s, s, y)
    assert core()(s, s, y).item() == pytest.approx(0, abs=1e-12)


class NoWaiting(TorchDispatchMode):
    """Forbids operations whose result the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"base": base, "standardise": stand} for base in BASES for stand in (False, True)),
        {"reduction": "group_mean"},
        {"weight_rule": "class"},
        {"compat": "sdd_kd_lskd"},
        {"base": "dkd", "compat": "sdd_dkd_lskd"},
        {"base": "nkd", "compat": "sdd_nkd"},
    ],
)
def test_no_loss_waits_for_the_device(changes: dict[str, object]) -> None:
    s, loss = logits().requires_grad_(), core(**changes)
    with NoWaiting():
        loss(s, logits(1), labels()).backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(s.sum() > 0)
    on_meta = loss(s.to("meta"), logits(1).to("meta"), labels().to("meta"))
    assert on_meta.shape == () and on_meta.device.type == "meta"


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 200, 1000])
def test_suggested_temperature_gives_the_surest_teacher_0_6(classes: int) -> None:
    surest = torch.zeros(1, classes, dtype=torch.float64)
    surest[0, 0] = 1
    probability = (normalize_logit(surest) / suggested_temperature(classes)).softmax(1)[0, 0]
    assert probability.item() == pytest.approx(0.6, abs=1e-3)
    assert suggested_temperature(100) == 2
