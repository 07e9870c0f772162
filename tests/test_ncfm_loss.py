"""The matching losses against complex arithmetic, closed forms and invariances."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from NCFM.cf_loss import CFLossFunc, MeanLossFunc, frequencies, real_embedding
from NCFM.NCFM_text import multi_layer_match_loss, mutil_layer_match_loss
from NCFM.sampling_net import LARGEST, SMALLEST, SamplingNet

WEIGHTS = [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.9, 0.1), (0.1, 2.0)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(real: Tensor, syn: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    """Amplitude and phase from complex exponentials: A, a, and the angle between the two values."""
    one, other = (torch.exp(1j * (x @ t.T)).mean(0) for x in (real, syn))
    size, size_other = one.abs(), other.abs()
    turn = 2 * size * size_other * (1 - torch.cos(one.angle() - other.angle()))
    return (alpha * (size - size_other) ** 2 + beta * turn).sqrt().mean()


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_loss_and_gradient_equal_complex_exponentials(alpha: float, beta: float) -> None:
    real, t = draw(7, 5), draw(11, 5, seed=1)
    syn = draw(4, 5, seed=2).requires_grad_()
    ours, expected = CFLossFunc(alpha, beta)(real, syn, t), brute_force(real, syn, t, alpha, beta)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(loss, syn)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9)])
def test_float32_gradient_is_right_near_convergence(alpha: float, beta: float) -> None:
    real, t = normalize(draw(64, 32)), draw(512, 32, seed=1)
    syn = normalize(real + 3e-4 * draw(64, 32, seed=2))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = syn.to(dtype).requires_grad_()
        loss = CFLossFunc(alpha, beta)(real.to(dtype), x, t.to(dtype))
        gradients.append(torch.autograd.grad(loss, x)[0].double())
    assert loss < 4e-4
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-3


def test_equal_sets_have_no_distance_and_a_finite_gradient() -> None:
    x = draw(6, 4).requires_grad_()
    loss = CFLossFunc(0.7, 0.3)(x.detach().flip(0), x, draw(9, 4, seed=1))
    loss.backward()
    assert loss < 1e-12
    assert x.grad is not None and x.grad.isfinite().all()


def test_loss_is_symmetric() -> None:
    a, b, t = draw(6, 4), draw(3, 4, seed=1), draw(9, 4, seed=2)
    torch.testing.assert_close(CFLossFunc(0.7, 0.3)(a, b, t), CFLossFunc(0.7, 0.3)(b, a, t))


def test_a_shift_of_all_features_is_all_phase() -> None:
    a, t = draw(6, 4), draw(9, 4, seed=2)
    assert CFLossFunc(1.0, 0.0)(a, a + 0.3, t) < 1e-7
    assert CFLossFunc(0.0, 1.0)(a, a + 0.3, t) > 0.05


def test_mean_loss_is_the_squared_distance_of_means() -> None:
    a, b = draw(6, 4), draw(3, 4, seed=1)
    expected = (a.mean(0) - b.mean(0)).pow(2).sum()
    torch.testing.assert_close(MeanLossFunc()(a, b, draw(2, 4)), expected)


@pytest.mark.parametrize("loss_func", [CFLossFunc(0.7, 0.3), MeanLossFunc()])
def test_classes_in_one_batch_equal_a_loop_over_classes(loss_func: CFLossFunc | MeanLossFunc) -> None:
    layers, classes, n, dim = 2, 3, 4, 5
    reals = [draw(layers, 6 + c, dim, seed=c) for c in range(classes)]
    t = draw(layers, 8, dim, seed=9)
    syn = draw(layers, classes, n, dim, seed=10).requires_grad_()
    real = torch.stack([real_embedding(r, t, loss_func) for r in reals], 1)
    batched = mutil_layer_match_loss(real, syn, t, loss_func, 300.0)
    looped = torch.stack(
        [
            sum(300.0 * loss_func(normalize(reals[c][k], dim=1), normalize(syn[k, c], dim=1), t[k]) for k in range(2))
            / 2
            for c in range(classes)
        ]
    )
    torch.testing.assert_close(batched, looped, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(x.sum(), syn)[0] for x in (batched, looped)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert multi_layer_match_loss is mutil_layer_match_loss


def test_frequencies_are_dealt_round_robin_to_the_scales() -> None:
    t = frequencies((1, 4000, 8), (1.0, 4.0), torch.Generator().manual_seed(0), draw(1))
    assert abs(float(t[0, ::2].std()) - 1) < 0.05
    assert abs(float(t[0, 1::2].std()) - 4) < 0.2


def test_the_sampling_net_climbs_while_its_scales_stay_bounded() -> None:
    noise, real, syn = draw(1, 64, 6), normalize(draw(20, 6, seed=1)), normalize(draw(5, 6, seed=2))
    net = SamplingNet(1, 64, (1.0,)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    values = []
    for _ in range(20):
        scaled = net(noise)
        t = scaled.detach().requires_grad_()
        loss = CFLossFunc()(real, syn, t[0])
        (grad,) = torch.autograd.grad(loss, t)
        optimizer.zero_grad()
        net.ascend(scaled, grad)
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] > values[0]
    assert SMALLEST < float(net.scales().detach().min()) <= float(net.scales().detach().max()) < LARGEST
    assert net(noise)[0].unique(dim=0).shape[0] == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_a_set_against_itself_has_gradient_zero(alpha: float, beta: float, dtype: torch.dtype) -> None:
    x = draw(6, 4).to(dtype)
    syn = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(CFLossFunc(alpha, beta)(x, syn, draw(9, 4, seed=1).to(dtype)), syn)
    assert not gradient.any()  # nan would count as any


@pytest.mark.parametrize("loss_func", [CFLossFunc(0.7, 0.3), MeanLossFunc()])
def test_order_of_samples_and_frequencies_does_not_matter(loss_func: CFLossFunc | MeanLossFunc) -> None:
    a, b, t = draw(6, 4), draw(3, 4, seed=1), draw(9, 4, seed=2)
    torch.testing.assert_close(loss_func(a[[3, 0, 5, 1, 4, 2]], b[[2, 0, 1]], t.flip(0)), loss_func(a, b, t))


def test_the_ascent_gradient_is_minus_that_of_the_loss() -> None:
    noise, real, syn = draw(2, 40, 6), draw(20, 6, seed=1), draw(5, 6, seed=2)
    net = SamplingNet(2, 40, (0.5, 2.0)).double()

    def loss(t: Tensor) -> Tensor:
        return sum((CFLossFunc(0.7, 0.3)(real, syn, layer) for layer in t), torch.zeros(()))

    (expected,) = torch.autograd.grad(loss(net(noise)), net.raw)
    scaled = net(noise)
    t = scaled.detach().requires_grad_()
    net.ascend(scaled, torch.autograd.grad(loss(t), t)[0])
    assert net.raw.grad is not None
    torch.testing.assert_close(net.raw.grad, -expected)


def test_scales_start_where_they_are_told_and_never_leave_their_bounds() -> None:
    net = SamplingNet(2, 40, (0.5, 2.0))  # 3 scales for 40 frequencies
    torch.testing.assert_close(net.scales().detach(), torch.tensor([[0.5, 2.0, 0.5]]).repeat(2, 1))
    torch.testing.assert_close(net(torch.ones(2, 40, 3))[0, :5, 0].detach(), torch.tensor([0.5, 2.0, 0.5, 0.5, 2.0]))
    with torch.no_grad():
        net.raw.copy_(torch.tensor([-1e9, 0.0, 1e9]))
    torch.testing.assert_close(net.scales()[0, ::2].detach(), torch.tensor([SMALLEST, LARGEST]))
