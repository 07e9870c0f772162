"""Group norm and pooling in our place have torch's values and derivatives, first and second."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from condenser.second_order import GroupNorm, Pool, SecondOrder


def draw(*shape: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_derivatives_of_group_norm_are_those_of_differences(groups: int) -> None:
    given = (draw(3, 4, 4, 6), draw(4, seed=1), draw(4, seed=2))
    assert gradcheck(lambda *args: GroupNorm.apply(*args, groups, 1e-5), given)
    assert gradgradcheck(lambda *args: GroupNorm.apply(*args, groups, 1e-5), given)


def test_derivatives_of_pooling_are_those_of_differences() -> None:
    assert gradcheck(Pool.apply, (draw(2, 3, 4, 6),)) and gradgradcheck(Pool.apply, (draw(2, 3, 4, 6),))


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("last", [torch.contiguous_format, torch.channels_last])
def test_a_network_has_the_same_second_derivatives_as_by_torch(size: int, last: torch.memory_format) -> None:
    x, k, w, b = draw(2, 3, size, size), draw(4, 3, 3, 3, seed=1), draw(4, seed=2), draw(4, seed=3)
    v = [draw(*t.shape, seed=4).detach() for t in (k, w, b)]

    def run() -> list[Tensor]:
        y = F.conv2d(x.contiguous(memory_format=last), k, padding=1)
        y = F.avg_pool2d(F.relu(F.group_norm(y, 2, w, b)), 2)
        y = F.group_norm(F.avg_pool2d(y, 3, 1, 1), 4)
        first = torch.autograd.grad(y.square().sum(), (k, w, b), create_graph=True)
        return [y, *first, *torch.autograd.grad(first, (x, k, w, b), v)]

    expected = run()
    with SecondOrder():
        found = run()
    assert any(type(node).__name__ == "GroupNormBackward" for node in nodes(found[0]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def nodes(y: Tensor) -> list[object]:
    met, left = list[object](), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            met.append(node)
            left += [parent for parent, _ in node.next_functions]
    return met


def test_a_third_derivative_is_refused() -> None:
    x, w, b = draw(2, 4, 2, 2), draw(4, seed=1), draw(4, seed=2)
    first = torch.autograd.grad(GroupNorm.apply(x, w, b, 2, 1e-5).pow(3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()
