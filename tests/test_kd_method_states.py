"""Memories, temperatures, sets that shrink, chains of teachers, fidelity: against loops, closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.spatial.distance import jensenshannon
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

from config import ConfigError
from kd.methods.chains import kept_teachers, last_batch_loss
from kd.methods.condensation import (
    Kcd,
    Record,
    empty_record,
    entropy_rows,
    mixed_images,
    next_count,
    note,
    summarise,
    values,
)
from kd.methods.contrast import (
    CrdMemory,
    UnitEmbedding,
    bags,
    bingo_loss,
    class_gaps,
    crd_loss,
    crd_memory,
    crd_negatives,
    crd_remember,
    info_nce,
    key_queue,
    partners,
    push,
)
from kd.methods.fidelity import Said, ensemble_logits, fidelity, js_rows, linear_cka
from kd.methods.probe import linear_probe
from kd.methods.temperature import (
    Ctkd,
    GlobalTemperature,
    GradientReversal,
    GradientReversalFunction,
    InstanceTemperature,
    curriculum,
)
from utils.losses import kl_rows

B, K = 6, 5


def gen(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


# --- CRD


def memory(samples: int = 20, width: int = 4) -> CrdMemory:
    old = crd_memory(samples, width, gen())
    return CrdMemory(*(x.double() for x in old))


def test_memory_begins_with_unit_second_moments() -> None:
    big = crd_memory(4000, 16, gen())
    for bank in (big.student, big.teacher):
        torch.testing.assert_close(bank.square().sum(1).mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert not big.student.equal(big.teacher)
    assert big.scale.tolist() == [0, 0]


def test_negatives_are_of_all_other_classes_and_none_else() -> None:
    labels = torch.tensor([2, 0, 1, 2, 1, 0, 0, 2])
    drawn = crd_negatives(class_gaps(labels), labels[:3], 4000, gen())
    for row, own in zip(drawn, (2, 0, 1), strict=True):
        others = [i for i in range(8) if labels[i] != own]
        counts = row.bincount(minlength=8)
        assert counts[labels == own].sum() == 0
        torch.testing.assert_close(counts[others] / 4000, torch.full((len(others),), 1 / len(others)), rtol=0.1, atol=0)
    assert drawn.equal(crd_negatives(class_gaps(labels), labels[:3], 4000, gen()))


def test_one_class_has_no_negatives() -> None:
    with pytest.raises(ConfigError, match="one class"):
        class_gaps(torch.zeros(4, dtype=torch.long))


def test_crd_is_noise_contrastive_estimation() -> None:
    m, ids = memory(), torch.tensor([3, 7])
    s, t = (F.normalize(draw(2, 4, seed=i)) for i in (1, 2))
    negatives = torch.randint(20, (2, 5), generator=gen(3))
    loss, scale = crd_loss(s, t, m, ids, negatives, 0.5)
    expected = 0.0
    for side, (x, bank) in enumerate(((s, m.teacher), (t, m.student))):
        out = [[math.exp(float(x[b] @ bank[i]) / 0.5) for i in (ids[b], *negatives[b])] for b in range(2)]
        z = 20 * float(np.mean(out))
        assert float(scale[side]) == pytest.approx(z)
        for row in out:
            p = [o / z / (o / z + 5 / 20) for o in row]
            expected -= (math.log(p[0]) + sum(math.log(1 - q) for q in p[1:])) / 2
    assert float(loss) == pytest.approx(expected)


def test_crd_normaliser_is_that_of_the_first_batch() -> None:
    m = memory()
    s, t, ids = draw(2, 4, seed=1), draw(2, 4, seed=2), torch.tensor([3, 7])
    crd_remember(m, s, t, ids, torch.tensor([5.0, 6.0]), 0.5)
    scale = crd_loss(s, t, m, ids, torch.randint(20, (2, 5), generator=gen(3)), 0.5)[1]
    assert scale.tolist() == [5.0, 6.0]


def test_crd_remembers_moving_unit_means_of_these_samples_only() -> None:
    m = memory()
    before = CrdMemory(*(x.clone() for x in m))
    s, t, ids = (F.normalize(draw(2, 4, seed=1)), F.normalize(draw(2, 4, seed=2)), torch.tensor([3, 7]))
    crd_remember(m, s, t, ids, torch.ones(2), 0.25)
    torch.testing.assert_close(m.student[ids], F.normalize(0.25 * before.student[ids] + 0.75 * s))
    torch.testing.assert_close(m.teacher[ids], F.normalize(0.25 * before.teacher[ids] + 0.75 * t))
    rest = [i for i in range(20) if i not in ids.tolist()]
    assert m.student[rest].equal(before.student[rest])


def test_embeddings_lie_on_the_sphere() -> None:
    rows = UnitEmbedding(12, 7)(draw(B, 3, 2, 2).float())
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(B))


# --- BINGO


def test_bags_are_the_nearest_others() -> None:
    x = draw(30, 4)
    angle = F.cosine_similarity(x[:, None], x[None], dim=2)
    expected = [sorted((j for j in range(30) if j != i), key=lambda j: -angle[i, j])[:3] for i in range(30)]
    assert bags(x, 3, chunk=7).tolist() == expected


def test_a_twin_of_an_image_is_in_its_bag_but_not_itself() -> None:
    found = bags(draw(10, 4)[[0, 0, 1, 2, 3]], 1)
    assert found[:2].flatten().tolist() == [1, 0]
    with pytest.raises(ConfigError, match="BAG"):
        bags(draw(3, 4), 3)


def test_partners_are_drawn_from_bags() -> None:
    neighbours = bags(draw(200, 4), 4)
    drawn = partners(neighbours, gen())
    assert (neighbours == drawn[:, None]).sum(1).tolist() == [1] * 200
    assert {int((neighbours[i] == drawn[i]).nonzero()) for i in range(200)} == {0, 1, 2, 3}
    assert drawn.equal(partners(neighbours, gen()))


def test_queue_wraps_and_forgets_the_oldest() -> None:
    queue = key_queue(5, 1, gen())
    for first in range(0, 12, 3):
        push(queue, torch.arange(first, first + 3.0)[:, None])
    assert queue.keys.flatten().tolist() == [10, 11, 7, 8, 9]
    assert int(queue.place) == 2


def test_info_nce_is_cross_entropy_of_the_own_key() -> None:
    q, k, queue = draw(B, 4), draw(B, 4, seed=1), draw(9, 4, seed=2)
    odds = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    expected = F.cross_entropy(odds, torch.zeros(B, dtype=torch.long), reduction="none")
    torch.testing.assert_close(info_nce(q, k, queue, 0.2), expected)


def test_bingo_pulls_anchor_and_member_to_one_key() -> None:
    a, m, k, queue = (draw(B, 4, seed=i) for i in range(4))
    intra, inter = bingo_loss(a, m, k, queue, 0.2)
    torch.testing.assert_close(intra, info_nce(a, k, queue, 0.2).mean())
    torch.testing.assert_close(inter, info_nce(m, k, queue, 0.2).mean())


# --- CTKD


@pytest.mark.parametrize("lambda_", [0.3, -0.3])
def test_gradient_is_reversed_for_either_sign_of_lambda(lambda_: float) -> None:
    x = draw(B).requires_grad_()
    y = GradientReversalFunction.apply(x, lambda_)
    assert y.equal(x)
    (y.square() / 2).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * x.detach())


def test_layers_before_the_reversal_climb_and_those_after_descend() -> None:
    before, after = torch.nn.Linear(2, 2).double(), torch.nn.Linear(2, 1).double()
    x = draw(B, 2)

    def grads(reverse: bool) -> list[Tensor]:
        h = GradientReversal()(before(x), 1.0) if reverse else before(x)
        return list(torch.autograd.grad(after(h).square().mean(), (before.weight, after.weight)))

    (climb, down), (descend, same) = grads(True), grads(False)
    torch.testing.assert_close(climb, -descend)
    torch.testing.assert_close(down, same)


def test_temperature_starts_where_published_and_where_asked() -> None:
    z = draw(B, K).float()
    assert GlobalTemperature()(z, z, 1.0).item() == pytest.approx(15.6212, abs=1e-4)
    assert GlobalTemperature(start=4)(z, z, 1.0).item() == pytest.approx(4)
    torch.testing.assert_close(InstanceTemperature(K, start=4)(z, z, 1.0), torch.full((B,), 4.0))


def test_temperature_moves_against_the_student() -> None:
    s, t = draw(B, K).float(), 3 * draw(B, K, seed=1).float()
    for net in (GlobalTemperature(start=4), InstanceTemperature(K, start=4)):
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        values = []
        for _ in range(30):
            loss = kl_rows(s, t, net(s, t, 1.0)[:, None]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values == sorted(values)
        assert values[-1] > values[0]


def test_temperature_stands_still_at_lambda_zero() -> None:
    net = GlobalTemperature()
    kl_rows(draw(B, K), draw(B, K, seed=1), net(draw(B, K), draw(B, K), 0.0)[:, None]).mean().backward()
    assert net.raw.grad is not None
    assert net.raw.grad.abs().max() == 0


def test_students_gradient_does_not_pass_the_temperature() -> None:
    s, t = draw(B, K).float().requires_grad_(), draw(B, K, seed=1).float()
    net = InstanceTemperature(K)
    torch.nn.init.normal_(list(net.parameters())[2], generator=gen())
    kl_rows(s, t, net(s, t, 1.0)[:, None]).sum().backward()
    fixed = net(s, t, 1.0).detach()
    assert s.grad is not None
    torch.testing.assert_close(
        s.grad, fixed[:, None] * ((s / fixed[:, None]).softmax(1) - (t / fixed[:, None]).softmax(1)).detach()
    )


def test_kl_with_learned_temperatures_is_kl_at_every_rows_temperature() -> None:
    s, t, temperature = draw(B, K), draw(B, K, seed=1), 1 + draw(B, seed=2).exp()
    expected = torch.stack([kl_rows(s[i], t[i], float(temperature[i])) for i in range(B)])
    torch.testing.assert_close(kl_rows(s, t, temperature[:, None]), expected)


def test_kl_times_squared_temperature_rises_to_its_limit() -> None:
    s, t = draw(B, K), draw(B, K, seed=1)
    gap = (t - t.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True))
    limit = gap.square().sum(1) / (2 * K)
    torch.testing.assert_close(kl_rows(s, t, torch.tensor([[1e4]], dtype=torch.float64)), limit, rtol=1e-3, atol=0)


def test_curriculum_is_half_a_cosine() -> None:
    assert curriculum(0, 10) == 0
    assert curriculum(5, 10) == pytest.approx(0.5)
    assert curriculum(10, 10) == curriculum(240, 10) == 1
    assert curriculum(240, 10, 0.25) == 0.25
    assert [round(curriculum(e, 10), 4) for e in (1, 2, 3)] == [0.0245, 0.0955, 0.2061]


def test_start_beyond_the_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="START"):
        Ctkd(START=21.0)


# --- KCD


def test_entropy_is_that_of_the_distribution_and_never_nan() -> None:
    z = draw(B, K)
    torch.testing.assert_close(entropy_rows(z), torch.distributions.Categorical(logits=z).entropy())
    assert entropy_rows(torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])).tolist() == pytest.approx([0, math.log(3)])


def test_values_are_mean_entropies_by_visits() -> None:
    record = empty_record(4)
    note(record, torch.tensor([0, 2]), torch.tensor([1.0, 3.0]))
    note(record, torch.tensor([2, 1]), torch.tensor([2.0, 0.5]))
    assert record.visits.tolist() == [1, 1, 2, 0]
    assert values(record, 2, 0.03).tolist() == pytest.approx([0.5**0.03, 0.5 * 0.5**0.03, 2.5, 0])


def test_set_shrinks_as_published() -> None:
    kcd, counts = Kcd(), [50000]
    for _ in range(8):
        counts.append(next_count(counts[-1], 50000, kcd.SHARE, kcd.STEPS))
    assert counts[1:] == [47500, 45000, 42500, 40000, 37500, 35000, 35000, 35000]


def test_counts_do_not_fall_to_rounding() -> None:
    assert next_count(60, 60, 0.9, 6) == 59  # 60 x (1 - 0.9) / 6 = 0.9999999999999998
    assert next_count(30, 100, 0.29, 6) == 29  # 100 x 0.29 = 28.999999999999996


def test_summary_keeps_the_best_and_enriches_the_least_of_them() -> None:
    worth = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    found = summarise(worth, 6, 4, 0.3)
    assert found.kept.tolist() == [0, 2, 4, 3]
    assert found.mixed.tolist() == [4, 3]
    assert found.left_out.tolist() == [1, 5]
    assert found.shares.tolist() == pytest.approx([0, 0.15])


def test_more_left_out_than_kept_mixes_the_best_of_them() -> None:
    found = summarise(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]), 6, 2, 0.3)
    assert found.mixed.tolist() == found.kept.tolist() == [0, 2]
    assert found.left_out.tolist() == [4, 3]


def test_summary_without_removal_mixes_nothing() -> None:
    found = summarise(torch.arange(6.0), 4, 4, 0.3)
    assert found.kept.tolist() == [5, 4, 3, 2]
    assert len(found.mixed) == len(found.left_out) == len(found.shares) == 0
    assert mixed_images(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2), found.shares).shape == (0, 3, 2, 2)


def test_ties_keep_the_order_of_samples() -> None:
    record = Record(torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.long))
    assert summarise(values(record, 40, 0.03), 5, 3, 0.3).kept.tolist() == [0, 1, 2]


def test_mixed_images_are_rounded_means() -> None:
    images, others = torch.tensor([[[0]], [[9]]], dtype=torch.uint8), torch.tensor([[[9]], [[0]]], dtype=torch.uint8)
    mixed = mixed_images(images, others, torch.tensor([0.0, 0.3]))
    assert mixed.dtype == torch.uint8
    assert mixed.flatten().tolist() == [0, 6]  # 6.3
    assert mixed_images(images, others, torch.tensor([0.3, 0.28])).flatten().tolist() == [3, 6]  # 2.7, 6.48


# --- assistants, DLB


def test_one_teacher_always_stays() -> None:
    for drop in (0, 1, 5):
        masks = torch.stack([kept_teachers(3, drop, gen(seed)) for seed in range(60)])
        assert masks.sum(1).tolist() == [max(3 - drop, 1)] * 60
        assert masks.any(0).all()
    assert kept_teachers(1, 1, gen()).tolist() == [True]


def test_last_batch_does_not_learn() -> None:
    now, last = draw(B, K).requires_grad_(), draw(B, K, seed=1).requires_grad_()
    loss = last_batch_loss(now, last, 3.0)
    loss.backward()
    expected = 9 * F.kl_div((now / 3).log_softmax(1), (last / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    assert last.grad is None


# --- fidelity, Jensen


def test_fidelity_of_a_pair() -> None:
    s, t, y = 2 * draw(40, K), 2 * draw(40, K, seed=1), torch.randint(K, (40,), generator=gen())
    one, other = Said(s, draw(9, 4, seed=2)), Said(t, draw(9, 6, seed=3))
    found = fidelity(one, other, y)
    assert found.cka == pytest.approx(100 * linear_cka(one.rows, other.rows))
    p, q = s.softmax(1), t.softmax(1)
    assert found.agreement == pytest.approx(100 * float(np.mean(s.argmax(1).numpy() == t.argmax(1).numpy())))
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(probs=x) for x in (q, p)))
    assert found.kl == pytest.approx(float(kl.mean()))
    assert found.student.nll == pytest.approx(-math.fsum(math.log(p[i, y[i]]) for i in range(40)) / 40)
    sure, hit = p.max(1)[0].numpy(), (p.argmax(1) == y).numpy()
    gaps = [abs((sure[b] - hit[b]).sum()) for b in (np.ceil(sure * 15) == i for i in range(1, 16))]
    assert found.student.ece == pytest.approx(100 * sum(gaps) / 40)
    back = fidelity(other, one, y)
    assert (back.agreement, back.student, back.teacher) == (found.agreement, found.teacher, found.student)
    assert (back.js, back.cka) == pytest.approx((found.js, found.cka)) and back.kl != found.kl
    assert found.as_dict().keys() == {
        "agreement", "kl_to_teacher", "js_to_teacher", "cka", "teacher_top1", "teacher_top5", "teacher_nll",
        "teacher_ece",
    }  # fmt: skip
    assert found.as_dict()["teacher_nll"] == found.teacher.nll


def test_fidelity_of_a_network_to_itself_is_perfect() -> None:
    own, y = Said(draw(20, K), draw(20, 3, seed=1)), torch.zeros(20, dtype=torch.long)
    found = fidelity(own, own, y)
    assert (found.agreement, found.kl) == (100, 0)
    assert found.cka == pytest.approx(100)
    assert found.js == pytest.approx(0, abs=1e-12)
    assert found.student == found.teacher


@pytest.mark.parametrize("seed", range(20))
def test_kl_is_not_negative(seed: int) -> None:
    s, t = 10 * draw(50, K, seed=seed), 10 * draw(50, K, seed=seed + 100)
    assert (kl_rows(s, t, 1.0) > 0).all()
    assert kl_rows(s, s + 7, 1.0).abs().max() < 1e-12
    near = s.float() + 1e-3 * t.float()
    assert (kl_rows(near, s.float(), 1.0) > -1e-6).all()  # rounding


def test_kl_is_not_negative_where_q_has_mass_outside_of_p() -> None:
    p, q = torch.tensor([1e4, 0.0, 0.0]).double(), torch.zeros(3).double()
    assert float(kl_rows(q, p, 1.0)) == pytest.approx(math.log(3))  # the sum of Q over P > 0 is 1 / 3


@pytest.mark.parametrize("seed", range(5))
def test_js_is_symmetric_bounded_and_that_of_scipy(seed: int) -> None:
    a, b = 5 * draw(B, K, seed=seed), 5 * draw(B, K, seed=seed + 100)
    value = js_rows(a, b)
    expected = [jensenshannon(x, y) ** 2 for x, y in zip(a.softmax(1).numpy(), b.softmax(1).numpy(), strict=True)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-8)
    torch.testing.assert_close(js_rows(b, a), value)
    assert (value >= 0).all()
    assert (value <= math.log(2)).all()


def test_js_of_disjoint_distributions_is_log_two() -> None:
    assert js_rows(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", ["exp", "square", "negative log", "p log p"])
def test_convex_functions_meet_jensen_and_lie_below_their_chords(name: str) -> None:
    f = {
        "exp": torch.exp, "square": torch.square, "negative log": lambda x: -x.log(), "p log p": lambda x: x * x.log()
    }[name]  # fmt: skip
    x, weights = 3 * draw(200, 6).abs() + 1e-3, draw(200, 6, seed=1).softmax(1)
    weights[:6] = torch.eye(6)  # all on one, none on the others
    assert (f((weights * x).sum(1)) <= (weights * f(x)).sum(1) + 1e-12).all()
    v, w, t = x[:, 0], x[:, 1], weights[:, 0]
    inside = f(v + t * (w - v))
    assert (inside <= f(v) + t * (f(w) - f(v)) + 1e-12).all()
    assert (inside > f(v) - t * (f(w) - f(v)) + 1e-12).any()  # with the other sign it does not hold


def test_ensemble_is_the_mean_of_probabilities() -> None:
    z = draw(3, B, K)
    torch.testing.assert_close(ensemble_logits(z).softmax(1), z.softmax(2).mean(0))


@pytest.mark.parametrize("samples", [8, 40])  # fewer and more than columns
def test_cka_is_the_normalised_product_of_centred_gram_matrices(samples: int) -> None:
    a, b = draw(samples, 10), draw(samples, 4, seed=1)
    centre = np.eye(samples) - 1 / samples
    k, m = (centre @ x.numpy() @ x.numpy().T @ centre for x in (a, b))
    assert linear_cka(a, b) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    turn = torch.linalg.qr(draw(10, 10, seed=2))[0]
    assert linear_cka(a, 3 * a @ turn + 1) == pytest.approx(1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-3])
def test_cka_of_constant_features_is_zero(scale: float) -> None:
    assert linear_cka(scale * draw(1, 3, 2).expand(11, 3, 2), draw(11, 4)) == 0


# --- linear evaluation


def test_linear_probe_is_logistic_regression() -> None:
    x, y = draw(120, 4), torch.randint(3, (120,), generator=gen())
    expected = LogisticRegression(C=1 / (120 * 0.01), tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    probe = linear_probe(x, y, 3, 0.01)
    torch.testing.assert_close(probe(x).softmax(1).numpy(), expected.predict_proba(x.numpy()), rtol=1e-4, atol=1e-5)


def test_linear_probe_that_did_not_converge_says_so() -> None:
    with pytest.raises(ConfigError, match="raise decay"):
        linear_probe(1e4 * draw(120, 4), torch.randint(3, (120,), generator=gen()), 3, 1e-4, 2)
