"""A student as a file that needs none of our code: torch.export's program of pixels to logits."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.checkpoint import atomic_write
from utils.image_networks import ImageNetwork
from utils.normaliser import Normaliser
from utils.wrapped_network import WrappedNetwork


class PixelNet(nn.Module):
    """Pixels to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, normaliser: Normaliser) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", normaliser.mean[:, None, None])
        self.register_buffer("std", normaliser.std[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, K] of pixels [B, C, H, W] in 0 ... 1."""
        found = self.net((pixels - self.mean) / self.std)
        return found if isinstance(found, Tensor) else found[0]


def export_student(net: ImageNetwork, normaliser: Normaliser, size: int, path: Path) -> None:
    """Write `path` (.pt2): `torch.export.load(path).module()(pixels)` for any batch of `size` pixels a side."""
    # A wrapped module leaves its forward at the last map, which a trace cannot follow; by itself it goes on.
    inner = net.get_submodule(WrappedNetwork.PLACE.removesuffix(".")) if isinstance(net, WrappedNetwork) else net
    whole = PixelNet(inner, normaliser).cpu().float().eval().to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, len(normaliser.mean), size, size)
    program = torch.export.export(whole, (example,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    atomic_write(path, buffer.getvalue())
