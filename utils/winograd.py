"""A 3 x 3 convolution with a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3) (Lavin & Gray, 2016).

The kernel libraries of processors no longer have it. For inference through torch.compile, which fuses the transforms.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_CHANNELS = 32  # below it the transforms cost more than they save
# Y = A' [(G g G') * (B' d B)] A of a 4 x 4 tile Y, from 6 x 6 inputs d and 3 x 3 weights g.
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def transformed_weights(weight: Tensor) -> Tensor:
    """G g G' of weights [O, C, 3, 3]: [36, C, O]."""
    g = torch.tensor(G, dtype=torch.float64).to(weight)
    return torch.einsum("ai,ocij,bj->abco", g, weight, g).flatten(0, 1)


def winograd(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Maps [N, H, W, C], padded by 1, with transformed weights [36, C, O] and bias [O]: [N, H, W, O].

    H and W must be multiples of 4.
    """
    count, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    corners = [[padded[:, i : i + height - 3 : 4, j : j + width - 3 : 4] for j in range(6)] for i in range(6)]
    tiles = torch.stack([entry for row in both_sides(B, corners) for entry in row])  # [36, N, H / 4, W / 4, C]
    products = (tiles.view(36, -1, channels) @ weights).view(6, 6, *tiles.shape[1:4], -1)
    out = both_sides(A, [list(row) for row in products])
    return torch.stack([torch.stack(row, 3) for row in out], 2).reshape(count, height, width, -1) + bias


def both_sides(m: Sequence[Sequence[float]], x: list[list[Tensor]]) -> list[list[Tensor]]:
    """M x M' of a matrix x of tensors."""
    left = [[combined(row, [line[j] for line in x]) for j in range(6)] for row in m]
    return [[combined(row, line) for row in m] for line in left]


def combined(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """A weighted sum without its zeros."""
    parts = [term if w == 1 else w * term for w, term in zip(weights, terms, strict=True) if w]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class WinogradConv(nn.Module):
    """Takes the place of a 3 x 3 convolution, whose weights it has as of the last `follow`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.weights: Tensor
        self.register_buffer("weights", transformed_weights(conv.weight.detach()))

    def follow(self) -> None:
        """Take over the weights as they are now."""
        self.weights.copy_(transformed_weights(self.conv.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] -> [N, O, H, W]; sides that tiles of 4 do not fill go the plain way."""
        if x.shape[2] % 4 or x.shape[3] % 4:
            return self.conv(x)
        bias = self.weights.new_zeros(self.weights.shape[2]) if self.conv.bias is None else self.conv.bias
        return winograd(x.permute(0, 2, 3, 1), self.weights, bias).permute(0, 3, 1, 2)


def fits(module: nn.Module) -> bool:
    """Whether a module is a convolution that gains: 3 x 3, stride 1, padding 1, one group, channels enough."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )


def with_winograd(net: nn.Module) -> nn.Module:
    """A second network on the same parameters, its fitting convolutions being WinogradConv."""
    twin = deepcopy(net, {id(p): p for p in net.parameters()})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and fits(child):
                setattr(module, name, WinogradConv(child))
    return twin


def follow(net: nn.Module) -> None:
    """Bring every WinogradConv of a network up to date with its parameters."""
    for module in net.modules():
        if isinstance(module, WinogradConv):
            module.follow()
