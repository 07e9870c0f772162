"""Losses on relations and maps against numpy loops, torch primitives, closed forms and invariances."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ConfigError
from kd.methods.hints import (
    Fusion,
    KnowledgeReview,
    Vid,
    VidHead,
    at_loss,
    fitnet_loss,
    nst_loss,
    review_loss,
    vid_loss,
)
from kd.methods.relations import (
    cells,
    dist_loss,
    ickd_loss,
    pearson,
    pkt_loss,
    projection,
    rkd_loss,
    sp_loss,
    unit,
)
from kd.methods.rotations import HierarchicalHeads, joint_labels, joint_loss, rotated, student_loss
from kd.methods.transformer import HierarchicalTargetAware, TargetAware, patch_groups, rebuilt

B, C, H, W = 4, 6, 8, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=9))[0]


PAIRS: list[tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = [
    (ickd_loss, (B, C, H, W)), (lambda s, t: ickd_loss(s, t, 2), (B, C, H, W)), (dist_loss, (B, C)),
    (rkd_loss, (B, C)), (pkt_loss, (B, C)), (sp_loss, (B, C, H, W)), (fitnet_loss, (B, C, H, W)),
    (at_loss, (B, C, H, W)), (nst_loss, (B, C, H, W)), (lambda s, t: review_loss([s], [t]), (B, C, H, W)),
]  # fmt: skip
NAMES = ["ickd", "ickd_grid", "dist", "rkd", "pkt", "sp", "fitnet", "at", "nst", "review"]
each_loss = pytest.mark.parametrize(("loss", "shape"), PAIRS, ids=NAMES)


@each_loss
def test_loss_is_zero_for_a_copy_and_else_positive(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    s, t = draw(*shape), draw(*shape, seed=1)
    assert loss(s, t) > 1e-5
    assert loss(t, t).abs() < 1e-3 * loss(s, t)  # DIST has an epsilon


@each_loss
def test_order_of_the_batch_does_not_matter(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    s, t = draw(*shape), draw(*shape, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(s[order], t[order]), loss(s, t))


@each_loss
@pytest.mark.parametrize("fill", ["zeros", "constant", "one sample twice"])
def test_degenerate_batches_have_finite_gradients(
    loss: Callable[..., Tensor], shape: tuple[int, ...], fill: str
) -> None:
    rows = {"zeros": torch.zeros(shape), "constant": torch.ones(shape), "one sample twice": draw(1, *shape[1:])}[fill]
    s = rows.float().expand(shape).clone().requires_grad_()
    value = loss(s, draw(*shape, seed=1).float())
    value.backward()
    assert value.isfinite()
    assert s.grad is not None
    assert s.grad.abs().max() < 1e4


@each_loss
def test_a_batch_of_one_is_finite(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    s = draw(1, *shape[1:]).requires_grad_()
    value = loss(s, draw(1, *shape[1:], seed=1))
    value.backward()
    assert value.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()


@each_loss
def test_half_precision_is_reduced_in_float32(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    s, t = draw(*shape).bfloat16(), draw(*shape, seed=1).bfloat16()
    value = loss(s, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(s.double(), t.double()), rtol=1e-4, atol=1e-6)


def test_unit_rows_of_zero_vectors_are_zero_without_gradient() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit(x).sum().backward()
    torch.testing.assert_close(unit(x).detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert x.grad is not None
    assert x.grad[1].tolist() == [0.0, 0.0]


def test_cells_are_slices() -> None:
    x, cut = draw(B, C, 6, 8), cells(draw(B, C, 6, 8), 3, 2)
    assert cut.shape == (B, 6, C, 2, 4)
    torch.testing.assert_close(cut[:, 3], x[:, :, 2:4, 4:])
    with pytest.raises(ConfigError, match="divisors"):
        cells(x, 4, 2)


def test_ickd_is_the_mean_squared_distance_of_channel_rows() -> None:
    s, t = draw(B, C, H, W), draw(B, C, 4, 4, seed=1)  # sizes may differ
    total = 0.0
    for a, b in zip(s.numpy(), t.numpy(), strict=True):
        grams = [f.reshape(C, -1) @ f.reshape(C, -1).T for f in (a, b)]
        rows = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in grams]
        total += ((rows[0] - rows[1]) ** 2).sum()
    assert float(ickd_loss(s, t)) == pytest.approx(total / (B * C))


def test_ickd_sees_neither_pixel_order_nor_scale() -> None:
    s, t = draw(B, C, H, W), draw(B, C, H, W, seed=1)
    order = torch.randperm(H * W, generator=torch.Generator().manual_seed(0))
    mixed = s.flatten(2)[:, :, order].unflatten(2, (H, W))
    torch.testing.assert_close(ickd_loss(3 * mixed, t), ickd_loss(s, t))


def test_grid_ickd_is_the_mean_over_quarters() -> None:
    s, t = draw(B, C, H, W), draw(B, C, H, W, seed=1)
    quarters = [(slice(i, i + 4), slice(j, j + 4)) for i in (0, 4) for j in (0, 4)]
    mean = sum(ickd_loss(s[:, :, y, x], t[:, :, y, x]) for y, x in quarters) / 4
    torch.testing.assert_close(ickd_loss(s, t, 2), mean)


def test_pearson_is_that_of_numpy() -> None:
    a, b = draw(B, C), draw(B, C, seed=1)
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(pearson(a, b, 0.0).numpy(), expected)


def test_dist_is_one_minus_correlations_of_rows_and_columns() -> None:
    s, t, tau = draw(B, C), draw(B, C, seed=1), 4.0
    p, q = ((z / tau).softmax(1).numpy() for z in (s, t))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    expected = tau**2 * (0.7 * rows + 1.3 * columns)
    assert float(dist_loss(s, t, tau, 0.7, 1.3)) == pytest.approx(expected, rel=1e-3)


def test_dist_does_not_see_a_p_plus_b() -> None:
    p = draw(B, 5, seed=2).softmax(1)
    squeezed = (0.5 * p + 0.1).log()  # rows still sum to 1
    assert float(dist_loss(squeezed, p.log(), 1.0)) < 1e-4


@pytest.mark.parametrize("classes", [5, 100, 1000])
def test_dist_gradient_is_bounded_at_a_uniform_student(classes: int) -> None:
    s = torch.zeros(8, classes, requires_grad=True)
    (8 * dist_loss(s, draw(8, classes).float(), 3.0, 1.0, 0.0)).backward()
    assert s.grad is not None
    torch.testing.assert_close(s.grad.norm(dim=1), torch.full((8,), 3 * 1e3 / classes**0.5), rtol=1e-3, atol=0)


def test_dist_of_one_row_has_no_columns_gradient() -> None:
    s = draw(1, C).requires_grad_()
    value = dist_loss(s, draw(1, C, seed=1), 1.0, 0.0, 1.0)
    value.backward()
    assert s.grad is not None
    assert value.item() == 1
    assert s.grad.abs().max() == 0


def test_rkd_is_a_loop_over_pairs_and_triplets() -> None:
    s, t = draw(B, C).numpy(), draw(B, 3, seed=1).numpy()

    def smooth(a: float) -> float:
        return 0.5 * a**2 if abs(a) < 1 else abs(a) - 0.5

    def distance(x: np.ndarray, i: int, j: int) -> float:
        every = [np.linalg.norm(x[a] - x[b]) for a in range(B) for b in range(B) if a != b]
        return float(np.linalg.norm(x[i] - x[j]) / np.mean(every))

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        return 0.0 if i in (j, k) else float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    r = range(B)
    pairs = np.mean([smooth(distance(s, i, j) - distance(t, i, j)) for i in r for j in r])
    triplets = np.mean([smooth(cosine(s, i, j, k) - cosine(t, i, j, k)) for i in r for j in r for k in r])
    value = rkd_loss(torch.from_numpy(s), torch.from_numpy(t), 2.0, 3.0)
    assert float(value) == pytest.approx(2 * pairs + 3 * triplets)


def test_rkd_sees_neither_rotation_nor_shift_nor_scale() -> None:
    t = draw(B, C)
    assert float(rkd_loss(3 * t @ rotation(C) + 5, t)) < 1e-12


def test_pkt_is_the_divergence_of_cosine_neighbourhoods() -> None:
    s, t = draw(B, C), draw(B, 3, seed=1)
    p, q = ((1 + F.cosine_similarity(x[:, None], x[None], dim=2)) / 2 for x in (s, t))
    p, q = (k / k.sum(1, keepdim=True) for k in (p, q))
    divergence = F.kl_div(p.log(), q, reduction="none").mean()
    torch.testing.assert_close(pkt_loss(s, t), divergence, rtol=1e-4, atol=1e-9)
    assert pkt_loss(s @ rotation(C), s).abs() < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_pkt_survives_opposite_vectors(seed: int) -> None:
    row = draw(1, 7, seed=seed).float()  # of rounded length, so that the cosine may lie below -1
    x = torch.cat([row, -3 * row]).requires_grad_()
    value = pkt_loss(x, torch.eye(2))
    value.backward()
    assert value.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_sp_is_the_squared_distance_of_normalised_gram_matrices() -> None:
    s, t = draw(B, C, H, W), draw(B, 3, 2, 2, seed=1)
    g, h = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (s, t))
    torch.testing.assert_close(sp_loss(s, t), torch.linalg.matrix_norm(g - h).square() / B**2)


def test_hints_average_the_higher_map() -> None:
    high, low = draw(B, C, H, W), draw(B, C, 4, 4, seed=1)
    pooled = F.avg_pool2d(high, 2)
    torch.testing.assert_close(fitnet_loss(high, low), F.mse_loss(pooled, low))
    torch.testing.assert_close(fitnet_loss(low, high), F.mse_loss(pooled, low))


def test_projection_only_changes_the_channels() -> None:
    assert projection(C, 9, 3)(draw(B, C, 5, 7).float()).shape == (B, 9, 5, 7)


def test_at_compares_normalised_energy_of_pixels() -> None:
    s, t = draw(B, C, H, W), draw(B, 3, H, W, seed=1)
    a, b = (F.normalize(x.square().sum(1).flatten(1)) for x in (s, t))
    torch.testing.assert_close(at_loss(s, t), F.mse_loss(a, b))


def test_nst_is_the_distance_of_mean_outer_products_of_channels() -> None:
    s, t = draw(B, C, 3, 4), draw(B, 5, 3, 4, seed=1)
    a, b = (torch.einsum("bcn,bcm->bnm", f, f) / f.shape[1] for f in (F.normalize(x.flatten(2), dim=2) for x in (s, t)))
    torch.testing.assert_close(nst_loss(s, t), torch.linalg.matrix_norm(a - b).square().mean())


def test_vid_is_a_gaussian_likelihood() -> None:
    mean, teacher, variance = draw(B, C, H, W), draw(B, C, H, W, seed=1), draw(C).exp()
    normal = torch.distributions.Normal(mean, variance.sqrt()[:, None, None])
    expected = -normal.log_prob(teacher).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(vid_loss(mean, variance, teacher), expected)


def test_vid_starts_at_its_variance() -> None:
    mean, variance = VidHead(C, 5, Vid().VARIANCE)(draw(B, C, H, W).float())
    assert mean.shape == (B, 5, H, W)
    torch.testing.assert_close(variance, torch.full((5,), 5.0), rtol=1e-5, atol=0)


def test_hcl_weighs_scales_by_halves() -> None:
    s, t = draw(B, C, H, W), draw(B, C, H, W, seed=1)
    parts = [F.mse_loss(F.avg_pool2d(s, k), F.avg_pool2d(t, k)) for k in (1, 2, 4, 8)]
    expected = sum(p * w for p, w in zip(parts, (1, 0.5, 0.25, 0.125), strict=True)) / 1.875
    torch.testing.assert_close(review_loss([s], [t]), expected)
    small, other = s[:, :, :4, :4], t[:, :, :4, :4]
    parts = [F.mse_loss(F.avg_pool2d(small, k), F.avg_pool2d(other, k)) for k in (1, 2, 4)]
    torch.testing.assert_close(review_loss([small], [other]), (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75)
    pooled = F.mse_loss(s[:, :, :1, :1], t[:, :, :1, :1])
    torch.testing.assert_close(review_loss([s, s[:, :, :1, :1]], [t, t[:, :, :1, :1]]), expected + pooled)


def test_fusion_weighs_a_map_and_the_deeper_one_apart() -> None:
    fusion = Fusion(C, C, C, deepest=False).double().eval()
    assert fusion.weigh is not None
    weight, bias = fusion.weigh.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([100.0, -100.0]))  # own map: all, deeper: nothing
    x = draw(B, C, H, W)
    deeper, other = draw(B, C, 4, 4, seed=1), draw(B, C, 4, 4, seed=2)
    torch.testing.assert_close(fusion(x, deeper, (H, W))[1], fusion.enter(x))
    with torch.no_grad():
        bias.copy_(torch.tensor([-100.0, 100.0]))
    torch.testing.assert_close(fusion(x, other, (H, W))[1], other.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_review_gives_maps_like_the_teachers_and_lets_gradients_climb() -> None:
    review = KnowledgeReview((4, 6, 6), (5, 7, 9), 8)
    maps = [draw(B, 4, 8, 8).float(), draw(B, 6, 4, 4).float().requires_grad_(), draw(B, 6, 1, 1).float()]
    out = review(maps, [(8, 8), (2, 2), (1, 1)])
    assert [tuple(x.shape[1:]) for x in out] == [(5, 8, 8), (7, 2, 2), (9, 1, 1)]
    out[0].square().sum().backward()  # a deeper student map helps at the shallow level
    assert maps[1].grad is not None
    assert maps[1].grad.abs().max() > 0


def test_rebuilt_map_is_a_mean_of_student_pixels_a_teacher_pixel() -> None:
    t, k, v = draw(B, 5, C), draw(B, 7, C, seed=1), draw(B, 7, C, seed=2)  # 5 pixels of the teacher, 7 of the student
    expected = np.empty((B, 5, C))
    for b in range(B):
        for i in range(5):
            e = np.exp([float(t[b, i] @ k[b, j]) for j in range(7)])
            expected[b, i] = (e[:, None] / e.sum() * v[b].numpy()).sum(0)
    np.testing.assert_allclose(rebuilt(t, k, v).numpy(), expected)


def test_rebuilt_map_does_not_see_the_order_of_student_pixels() -> None:
    t, s = draw(B, 5, C), draw(B, 7, C, seed=1)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(rebuilt(t, s[:, order], s[:, order]), rebuilt(t, s, s))


def test_target_aware_map_has_the_teachers_shape() -> None:
    out = TargetAware(4, 6)(draw(B, 4, 8, 8).float(), draw(B, 6, 5, 5).float())
    assert out.shape == (B, 6, 5, 5)


def test_patch_groups_stack_neighbours_on_channels() -> None:
    x = draw(B, 2, H, W)
    groups = patch_groups(x, 4, 8)
    assert groups.shape == (B * 8, 4, 2, 2)
    torch.testing.assert_close(groups[8 + 1], torch.cat([x[1, :, :2, 4:6], x[1, :, :2, 6:]]))
    assert patch_groups(x, 1, 1).equal(x)
    with pytest.raises(ConfigError, match="divisor"):
        patch_groups(x, 4, 3)


def test_hierarchical_tat_trains_both_parts() -> None:
    net = HierarchicalTargetAware(3, 4, 1, count=4, groups=8, anchor=2)
    local, whole = net(draw(B, 3, 8, 8).float(), draw(B, 4, 16, 16).float())
    (local + whole).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_rotations_are_sample_major_and_one_more_turn_shifts_them() -> None:
    x = draw(3, 2, 5, 5)
    rows = rotated(x)
    torch.testing.assert_close(rows[::4], x)
    torch.testing.assert_close(rows[5], x[1].flip(2).mT)  # a quarter, counter-clockwise
    again = rotated(x.rot90(1, (2, 3))).unflatten(0, (3, 4))
    torch.testing.assert_close(again, rows.unflatten(0, (3, 4)).roll(-1, 1))
    with pytest.raises(ConfigError, match="square"):
        rotated(draw(1, 1, 4, 6))


def test_joint_labels_are_class_major() -> None:
    assert joint_labels(torch.tensor([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_every_head_gives_joint_logits() -> None:
    heads = HierarchicalHeads((4, 6, 8), 5)
    out = heads([draw(8, 4, 8, 8).float(), draw(8, 6, 4, 4).float(), draw(8, 8, 2, 2).float()])
    assert [tuple(z.shape) for z in out] == [(8, 20)] * 3


def test_heads_of_hsakd_s_teacher_tell_class_and_turn() -> None:
    labels, heads = torch.tensor([1, 0]), [draw(8, 12, seed=1), draw(8, 12, seed=2)]
    joint = sum(-z.log_softmax(1)[torch.arange(8), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])].mean() for z in heads)
    torch.testing.assert_close(joint_loss(heads, labels), joint)


def test_student_of_hsakd_follows_all_rows() -> None:
    s, t, heads, theirs = draw(8, 3), draw(8, 3, seed=1), [draw(8, 12, seed=2)] * 2, [draw(8, 12, seed=3)] * 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return 9 * F.kl_div((a / 3).log_softmax(1), (b / 3).softmax(1), reduction="batchmean")

    main, joint = student_loss(s, heads, t, theirs, 3.0)
    torch.testing.assert_close(main, kl(s, t))
    torch.testing.assert_close(joint, 2 * kl(heads[0], theirs[0]))
