"""CPU seconds of an evaluation in fixed tiles against the plain batched one, as ratios of the same rounds.

    OMP_NUM_THREADS=1 python -m scripts.bench_invariant              # 2,000 images of 32 x 32, ConvNet of 128 channels
    python -m scripts.bench_invariant --batch 512 --tile 64 --rounds 9

First, how many images' logits change in any bit when they come in another order, in requests of 1, 2, 3 ... images;
status 1 if any do in tiles. Both sides have the same network, images, threads and allocator.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from config import ConfigError
from config.cli import Parser, positive
from utils.image_networks import ImageNetworkConfig, image_network
from utils.invariant import TILE, check_tile, tiled
from utils.program import leave
from utils.streams import generator

IMAGES = 2000

Logits = Callable[[Tensor], Tensor]


def make(width: int, count: int, batch: int, tile: int) -> tuple[dict[str, Logits], Tensor]:
    """Both evaluations by name, and random images [count, 3, 32, 32]."""
    net = image_network(ImageNetworkConfig(width=width), 3, 32, 10, 0, "benchmark").eval()
    images = torch.randn(count, 3, 32, 32, generator=generator(0, "benchmark images"))

    def logits(x: Tensor) -> Tensor:
        return net(x).logits

    @torch.no_grad()
    def plain(x: Tensor) -> Tensor:
        return torch.cat([logits(part) for part in x.split(batch)])

    return {"plain": plain, "tiled": lambda x: tiled(logits, x, tile)}, images


def differing(logits: Logits, images: Tensor) -> int:
    """Images whose logits change when they come in another order, in requests of 1, 2, 3 ... images."""
    order = torch.randperm(len(images), generator=generator(0, "benchmark order"))
    ends = torch.arange(1, len(images)).cumsum(0)
    asked = torch.cat([logits(images[part]) for part in order.tensor_split(ends[ends < len(images)])])
    return int((asked != logits(images)[order]).any(1).sum())


def command_line() -> Parser:
    """Its options."""
    parser = Parser(__doc__)
    add = partial(parser.add_argument, metavar="N")
    add("--batch", type=positive, default=256, help="images of a plain pass (default: 256)")
    add("--tile", type=int, default=TILE, help=f"images of a tile (default: {TILE})")
    add("--rounds", type=positive, default=5, help="rounds to time, after one to warm up (default: 5)")
    return parser


def main() -> int:
    """Print differing images, rounds and ratios; exit status 1 if logits in tiles are not equal to the bit."""
    parser = command_line()
    args = parser.parse_args()
    try:
        check_tile(args.tile)
    except ConfigError as error:
        parser.error(f"--{error}")
    sides, images = make(128, IMAGES, args.batch, args.tile)
    changed = {name: differing(logits, images) for name, logits in sides.items()}
    print(f"{torch.get_num_threads()} threads, batch {args.batch}, tile {args.tile}")
    print("images whose logits change with order and request: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    if changed["tiled"]:
        return 1
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):  # each side first in every other round
            began = time.process_time()
            sides[name](images)
            taken[name].append(time.process_time() - began)
        print(f"round {number}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in taken.items()), flush=True)
    ratios = [a / b for a, b in zip(taken["tiled"][1:], taken["plain"][1:], strict=True)]
    print(f"tiled / plain: {statistics.median(ratios):.3f} [{min(ratios):.3f} - {max(ratios):.3f}]")
    return 0


if __name__ == "__main__":
    leave(main())
