"""Logits and gradients whose last bit does not depend on how samples are batched, for one device, dtype, number of
threads and version of the libraries.

Three things change the order in which a kernel adds, and with it the last bits of a row:
- the batch size: libraries choose kernels and block sizes by shape (one row is a matrix-vector product);
- the place in the batch: rows are shared among threads and computed in blocks, and those left over meet another kernel
  (seen: the fifth of 5 rows on two threads; the last two of 6 rows with one output each);
- the address: some kernels round differently where a tensor does not start at a multiple of 64 bytes.
So everything is computed in tiles of one size, a multiple of TILE_STEP, that start at such addresses: 16 samples of any
shape fill a multiple of 64 bytes in float32. `python -m scripts.bench_invariant` checks and times that on a CPU. A GPU
also needs torch.backends.cudnn.benchmark = False and, for gradients, torch.use_deterministic_algorithms(True) with
CUBLAS_WORKSPACE_CONFIG=:4096:8; `pytest -m gpu tests/test_invariant.py` checks it there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from config import ConfigError

TILE = 32  # samples: padding costs little of an evaluation, and small requests are not all padding
TILE_STEP = 16


def check_tile(tile: int) -> None:
    """Raises ConfigError unless `tile` is a positive multiple of TILE_STEP."""
    if tile < 1 or tile % TILE_STEP:
        raise ConfigError(f"tile: {tile} samples would round by their place in it; take a multiple of {TILE_STEP}")


@torch.no_grad()
def tiled(forward: Callable[[Tensor], Tensor], x: Tensor, tile: int = TILE) -> Tensor:
    """Rows [B, C] of `forward` for samples [B, ...], always of `tile` samples at a time, the last ones zeros.

    `forward` treats samples apart, as networks do in eval mode. Raises ConfigError for a tile of another size.
    """
    check_tile(tile)
    rows = []
    for start in range(0, max(len(x), 1), tile):
        part = x[start : start + tile]
        room = x.new_zeros(tile, *x.shape[1:])
        room[: len(part)] = part
        rows.append(forward(room))
    return torch.cat(rows)[: len(x)]


def tiled_gradients(
    loss_sum: Callable[[slice], Tensor],
    parameters: Sequence[Tensor],
    samples: range,
    tile: int = TILE,
    before: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Sum over `samples` of a loss, and of its gradient by each parameter, in float32 or better: [1 + P] tensors.

    `loss_sum` gives the loss of some samples of the step, numbered 0 to N - 1. A micro-batch goes on from the sums
    `before` it; after the last, `loss, *gradients = (total / N for total in sums)` have the same bits whatever the
    micro-batches. Raises ConfigError for a micro-batch that does not start with a tile.
    """
    check_tile(tile)
    if samples.start % tile:
        raise ConfigError(f"micro-batch: starts at sample {samples.start}; let its size be a multiple of tile: {tile}")
    sums = list(before)
    for start in range(samples.start, samples.stop, tile):
        loss = loss_sum(slice(start, min(start + tile, samples.stop)))
        parts = [loss.detach(), *torch.autograd.grad(loss, parameters, materialize_grads=True)]
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
    return sums
