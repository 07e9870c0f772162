"""Losses of the toolkit against numpy loops over single entries, and what padding must not do."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config import ConfigError
from kd.distilltool.presets import ADAPTOR_KEYS, FEATURES, KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP
from utils.losses import cross_entropy_rows, kl_rows, masked_mean, similarity

B, H, L, D, C = 3, 2, 5, 4, 6
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 0]])
FOUR = ["attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"]
THREE = ["attention_mse_sum", "attention_ce_mean"]
Array = np.ndarray[Any, Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def kept(m: Array, b: int) -> list[int]:
    return [i for i in range(m.shape[1]) if m[b, i]]


def np_attention_mse(s: Array, t: Array, m: Array) -> float:
    found = [
        (s[b, h, q, k] - t[b, h, q, k]) ** 2
        for b in range(len(s)) for h in range(s.shape[1]) for q in kept(m, b) for k in kept(m, b)
    ]  # fmt: skip
    return sum(found) / len(found)


def np_attention_ce(s: Array, t: Array, m: Array) -> float:
    found = []
    for b in range(len(s)):
        for h in range(s.shape[1]):
            for q in kept(m, b):
                p, r = softmax(t[b, h, q, kept(m, b)]), softmax(s[b, h, q, kept(m, b)])
                found.append(-(p * np.log(r)).sum())
    return sum(found) / len(found)


def heads(x: Array, how: str) -> Array:
    return (getattr(x, how)(1) if x.ndim == 4 else x)[:, None]


def np_hidden_mse(s: Array, t: Array, m: Array) -> float:
    return float(np.mean([(s[b, i] - t[b, i]) ** 2 for b in range(len(s)) for i in kept(m, b)]))


def np_cos(s: Array, t: Array, m: Array) -> float:
    def one(x: Array, y: Array) -> float:
        return 1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))

    return float(np.mean([one(s[b, i], t[b, i]) for b in range(len(s)) for i in kept(m, b)]))


def np_pkd(s: Array, t: Array, m: Array) -> float:
    return float(np.mean([
        ((s[b, 0] / np.linalg.norm(s[b, 0]) - t[b, 0] / np.linalg.norm(t[b, 0])) ** 2).sum() for b in range(len(s))
    ]))  # fmt: skip


def np_gram(s: list[Array], t: list[Array], m: Array) -> float:
    found = []
    for b in range(len(m)):
        one, other = (sum(np.outer(x[0][b, i], x[1][b, i]) for i in kept(m, b)) / len(kept(m, b)) for x in (s, t))
        found.append((one - other) ** 2)
    return float(np.mean(found))


def np_mmd(s: list[Array], t: list[Array], m: Array) -> float:
    found = []
    for b in range(len(m)):
        for q in kept(m, b):
            for k in kept(m, b):
                one, other = (float(x[0][b, q] @ x[1][b, k]) / x[0].shape[-1] for x in (s, t))
                found.append((one - other) ** 2)
    return sum(found) / len(found)


ORACLE: dict[str, Callable[..., float]] = {
    "attention_mse": np_attention_mse,
    "attention_mse_sum": lambda s, t, m: np_attention_mse(heads(s, "sum"), heads(t, "sum"), m),
    "attention_ce": np_attention_ce,
    "attention_ce_mean": lambda s, t, m: np_attention_ce(heads(s, "mean"), heads(t, "mean"), m),
    "hidden_mse": np_hidden_mse,
    "cos": np_cos,
    "pkd": np_pkd,
    "gram": np_gram,
    "mmd": np_mmd,
}


def states(name: str, rank: int, seed: int, length: int = L, width: int = D) -> list[Tensor]:
    """One state, or two for a loss of pairs."""
    if name in FOUR:
        shape = (B, H, length, length) if rank == 4 else (B, length, length)
        return [draw(*shape, seed=seed)]
    return [draw(B, length, width, seed=seed + i) for i in range(2 if name in ("gram", "mmd") else 1)]


def value(name: str, s: list[Tensor], t: list[Tensor], mask: Tensor | None) -> Tensor:
    loss = MATCH_LOSS_MAP[name]
    return loss(s[0], t[0], mask=mask) if len(s) == 1 else loss(s, t, mask=mask)


CASES = [(name, 4) for name in ORACLE] + [(name, 3) for name in THREE]


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.double()], ids=["plain", "int", "bool", "float"])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_match_losses_are_sums_over_single_entries(name: str, rank: int, mask: Tensor | None) -> None:
    s, t = states(name, rank, 1), states(name, rank, 11, width=7 if name == "mmd" else D)
    numpy = [[x.numpy() for x in state] if len(state) > 1 else state[0].numpy() for state in (s, t)]
    expected = ORACLE[name](*numpy, np.ones((B, L)) if mask is None else MASK.numpy())
    assert abs(float(value(name, s, t, mask)) - expected) < 1e-10


def padded(x: Tensor, name: str, extra: int, filler: float) -> Tensor:
    pad = (0, extra, 0, extra) if name in FOUR else (0, 0, 0, extra)
    return torch.nn.functional.pad(x, pad, value=filler)


@pytest.mark.parametrize("filler", [0.0, 1e4, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_padding_changes_neither_value_nor_gradient(name: str, rank: int, filler: float) -> None:
    plain_s, t = [x.requires_grad_() for x in states(name, rank, 1)], states(name, rank, 11)
    more_s = [padded(x.detach(), name, 2, filler).requires_grad_() for x in plain_s]
    more_t = [padded(x, name, 2, filler) for x in t]
    longer = torch.nn.functional.pad(MASK, (0, 2))
    plain, more = value(name, plain_s, t, MASK), value(name, more_s, more_t, longer)
    torch.testing.assert_close(more, plain, rtol=1e-12, atol=1e-12)
    for x, y in zip(torch.autograd.grad(plain, plain_s), torch.autograd.grad(more, more_s), strict=True):
        inner = y[..., :L, :L] if name in FOUR else y[:, :L]
        torch.testing.assert_close(inner, x, rtol=1e-12, atol=1e-12)
        assert y.count_nonzero() == inner.count_nonzero()  # nan would count
        if name != "pkd":  # what is masked among the first L has no gradient either
            assert (
                not x.isnan().any()
                and not (x * (MASK[:, None, :, None] if x.dim() == 4 else MASK[..., None]) - x).any()
            )


@pytest.mark.parametrize(("name", "rank"), [case for case in CASES if case[0] != "pkd"])
def test_a_sample_of_padding_alone_does_not_count_and_nothing_but_padding_is_zero(name: str, rank: int) -> None:
    s, t = [x.requires_grad_() for x in states(name, rank, 1)], states(name, rank, 11)
    mask = MASK.clone()
    mask[1] = 0
    others = torch.tensor([0, 2])
    expected = value(name, [x[others] for x in s], [x[others] for x in t], MASK[others])
    torch.testing.assert_close(value(name, s, t, mask), expected, rtol=1e-12, atol=1e-12)
    none = value(name, s, t, torch.zeros_like(MASK))
    assert float(none.detach()) == 0
    assert all(not g.any() for g in torch.autograd.grad(none, s))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_equal_states_cost_nothing_but_the_teacher_s_entropy(name: str, rank: int) -> None:
    s = [x.requires_grad_() for x in states(name, rank, 1)]
    found = value(name, s, [x.detach() for x in s], MASK)
    if "ce" not in name:
        assert abs(float(found.detach())) < 1e-12
    for gradient in torch.autograd.grad(found, s):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_gradients_are_those_of_finite_differences(name: str, rank: int) -> None:
    t, mask = states(name, rank, 11), MASK
    s = [x.requires_grad_() for x in states(name, rank, 1)]
    assert torch.autograd.gradcheck(lambda *x: value(name, list(x), t, mask), s, fast_mode=True)


def test_order_of_samples_does_not_matter() -> None:
    order = torch.tensor([2, 0, 1])
    for name, rank in CASES:
        s, t = states(name, rank, 1), states(name, rank, 11)
        turned = value(name, [x[order] for x in s], [x[order] for x in t], MASK[order])
        torch.testing.assert_close(turned, value(name, s, t, MASK))


def test_mmd_does_not_see_an_orthogonal_map_of_the_features() -> None:
    turn = torch.linalg.qr(draw(D, D, seed=5))[0]
    s, t = states("mmd", 4, 1), states("mmd", 4, 11)
    torch.testing.assert_close(value("mmd", [x @ turn for x in s], t, MASK), value("mmd", s, t, MASK))


def test_attention_ce_of_logarithms_is_the_cross_entropy_of_probabilities() -> None:
    p, q = (draw(B, H, L, L, seed=i).softmax(-1) for i in (1, 2))
    expected = -(p * q.log()).sum(-1).mean()
    torch.testing.assert_close(MATCH_LOSS_MAP["attention_ce"](q.log(), p.log()), expected, rtol=1e-12, atol=1e-12)


def test_kd_losses_are_sums_over_single_rows() -> None:
    s, t, temperature = draw(5, C, seed=1), draw(5, C, seed=2), 3.0
    a, b = s.numpy() / temperature, t.numpy() / temperature
    ce = np.mean([-(softmax(y) * np.log(softmax(x))).sum() for x, y in zip(a, b, strict=True)])
    p, q = 1 / (1 + np.exp(-b)), 1 / (1 + np.exp(-a))
    bce = np.mean((-p * np.log(q) - (1 - p) * np.log(1 - q)).sum(1))
    for name, expected in {"ce": ce, "mse": np.mean((a - b) ** 2), "bce": bce}.items():
        assert abs(float(KD_LOSS_MAP[name](s, t, temperature)) - expected) < 1e-10


def test_the_gradient_of_ce_is_that_of_kl_over_t_squared() -> None:
    s, t = draw(5, C, seed=1).requires_grad_(), draw(5, C, seed=2)
    (ce,) = torch.autograd.grad(KD_LOSS_MAP["ce"](s, t, 4.0), s)
    (kl,) = torch.autograd.grad(kl_rows(s, t, 4.0).mean(), s)
    torch.testing.assert_close(ce * 16, kl, rtol=1e-12, atol=1e-14)


def test_classes_of_minus_infinity_have_no_part() -> None:
    s, t = draw(5, C, seed=1).requires_grad_(), draw(5, C, seed=2)
    wide = [torch.cat([x, torch.full((5, 2), -math.inf, dtype=torch.float64)], 1) for x in (s, t)]
    torch.testing.assert_close(KD_LOSS_MAP["ce"](*wide, 2.0), KD_LOSS_MAP["ce"](s, t, 2.0))
    (gradient,) = torch.autograd.grad(KD_LOSS_MAP["ce"](*wide, 2.0), s)
    torch.testing.assert_close(gradient, torch.autograd.grad(KD_LOSS_MAP["ce"](s, t, 2.0), s)[0])
    assert all(float(loss(torch.empty(0, C), torch.empty(0, C), 2.0)) == 0 for loss in KD_LOSS_MAP.values())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_16_bit_states_are_reduced_in_float32(kind: torch.dtype) -> None:
    for name, rank in CASES:
        s, t = ([300 * x.to(kind) for x in states(name, rank, seed)] for seed in (1, 11))
        found = value(name, s, t, MASK)
        assert found.dtype == torch.float32 and found.isfinite()
        exact = value(name, [x.double() for x in s], [x.double() for x in t], MASK)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_presets_are_what_the_requirement_lists() -> None:
    assert FEATURES == ["hidden", "attention"]
    assert ADAPTOR_KEYS == ["logits", "logits_mask", "losses", "inputs_mask", "hidden", "attention"]
    assert list(PROJ_MAP) == ["linear"] and list(KD_LOSS_MAP)[:2] == ["ce", "mse"]
    assert list(MATCH_LOSS_MAP) == [
        "attention_mse_sum", "attention_mse", "attention_ce_mean", "attention_ce", "hidden_mse", "cos", "pkd", "gram",
        "mmd",
    ]  # fmt: skip


def test_shapes_that_do_not_fit_are_one_line_with_a_remedy() -> None:
    three, four = draw(B, L, L), draw(B, H, L, L)
    wrong: list[tuple[str, Any, Any, Any, str]] = [
        ("attention_mse", three, three, None, "attention_mse_sum takes"),
        ("attention_ce", four, four[:, :1], None, "attention_ce_mean takes"),
        ("hidden_mse", draw(B, L, 3), draw(B, L, 4), None, "add proj"),
        ("hidden_mse", draw(B, L, 3), draw(B, L, 3), MASK[:, :2], r"the mask must be \[B, L\]"),
        ("cos", draw(B, L, 3), draw(B, 4, 3), None, "one shape"),
        ("gram", draw(B, L, 3), draw(B, L, 3), None, "a list of two"),
        ("mmd", [draw(B, L, 3)] * 2, [draw(B, 4, 3)] * 2, None, "B and L"),
        ("mmd", [draw(B, L, 3), draw(B, L, 4)], [draw(B, L, 3)] * 2, None, "two layers of one width"),
    ]  # fmt: skip
    for name, s, t, mask, said in wrong:
        with pytest.raises(ConfigError, match=said) as caught:
            MATCH_LOSS_MAP[name](s, t, mask=mask)
        assert "\n" not in str(caught.value)


def test_shared_primitives_have_their_closed_forms() -> None:
    x, y = draw(B, L, D, seed=1), draw(B, L, D, seed=2)
    torch.testing.assert_close(similarity(x, y, "tokens"), torch.einsum("bid,bjd->bij", x, y) / D)
    torch.testing.assert_close(similarity(x, y, "channels"), torch.einsum("bid,bie->bde", x, y) / L)
    torch.testing.assert_close(
        cross_entropy_rows(x, y, 2.0),
        torch.nn.functional.cross_entropy(x.mT / 2, (y / 2).softmax(-1).mT, reduction="none"),
    )
    assert masked_mean(x) == x.mean() and masked_mean(x, torch.zeros_like(x)) == 0


def test_textbrewer_agrees_where_it_should() -> None:
    theirs = pytest.importorskip("textbrewer.losses")
    mask = MASK.double()
    s, t = draw(B, H, L, L, seed=1), draw(B, H, L, L, seed=2)
    apart = (1 - mask)[:, None, None] * -1e4  # padded keys as its additive masks have them
    for name in ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"):
        shift = apart if "ce" in name else 0
        ours = MATCH_LOSS_MAP[name](s + shift, t + shift, mask=mask)
        torch.testing.assert_close(ours, getattr(theirs, f"att_{name[10:]}_loss")(s + shift, t + shift, mask))
    x, y = (draw(B, L, D, seed=i) for i in (3, 4))
    for name, other in (("hidden_mse", "hid_mse_loss"), ("cos", "cos_loss"), ("pkd", "pkd_loss")):
        torch.testing.assert_close(MATCH_LOSS_MAP[name](x, y, mask=mask), getattr(theirs, other)(x, y, mask))
    torch.testing.assert_close(MATCH_LOSS_MAP["gram"]([x, y], [y, y], mask=mask), theirs.fsp_loss([x, y], [y, y], mask))
    torch.testing.assert_close(MATCH_LOSS_MAP["mmd"]([x, y], [y, y]), theirs.mmd_loss([x, y], [y, y]))
    torch.testing.assert_close(KD_LOSS_MAP["ce"](x[:, 0], y[:, 0], 3.0), theirs.kd_ce_loss(x[:, 0], y[:, 0], 3.0))
    torch.testing.assert_close(KD_LOSS_MAP["mse"](x[:, 0], y[:, 0], 3.0), theirs.kd_mse_loss(x[:, 0], y[:, 0], 3.0))
