"""What more classes and more ranks cost an iteration: seconds, counted FLOPs, bytes summed over ranks, bytes of state.

    python -m scripts.bench_scale                                           # cost a class, by the number of classes
    torchrun --nproc_per_node=2 -m scripts.bench_scale --device cpu         # the same work on two ranks
    python -m scripts.bench_scale --full --classes 1 --rounds 1             # a class of ImageNet-1K at 64 pixels
    python -m scripts.bench_scale --paper --classes 1000 10000 --ranks 8    # its bytes, from shapes alone

ncfm condenses, datm follows a student of two steps that each see the whole set, features does so with maps as labels.
All on random images. Ranks share out classes (ncfm) or the samples of a step. FLOPs are of all ranks, a multiplication
and an addition being two; seconds are the slowest rank's, its processor's beside the clock's; `summed` is what a rank
gives to all-reduces, state what a checkpoint holds.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from condenser.Condenser_image import Condenser, ImageCondenseConfig
from condenser.feature_labels import FeatureConfig
from condenser.loop import Rows
from condenser.optimization import OptimizationConfig, make_optimizer
from condenser.synthetic_set import SyntheticSet
from condenser.trajectory import flat_parameters
from condenser.trajectory_condenser import TrajectoryCondenser, TrajectoryConfig
from config.cli import Parser, positive
from scripts.versus import bench_parser, device_of, seconds
from utils.ddp import World, distribute_class, process_group
from utils.expert_buffers import ExpertBuffer, ExpertNotes, ExpertWriter, expert_file, parameters_of
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.program import leave
from utils.streams import generator
from utils.teachers import TeacherBank, trainable
from utils.utils_image import ImageSet

METHODS = ("ncfm", "datm", "features")
IMAGES = 1281  # real ones a class, ImageNet's mean
PUBLISHED_STEPS = 20  # of DATM's student on Tiny-ImageNet, 1000 samples each
Iteration = Callable[[int], object]
Job = tuple[Iteration, Mapping[str, Rows]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of one benchmark."""

    size: int = 16
    width: int = 32
    depth: int = 3
    ipc: int = 10
    batch_real: int = 64
    freqs: int = 256
    head: int = 0  # classes of the network; 0: those of the benchmark


FULL = Shapes(64, 128, 4, 50, 1024, 4096, 1000)


@dataclass(frozen=True)
class Counted(World):
    """A world that notes the bytes of what it sums."""

    summed: list[int] = field(default_factory=list)

    def sum(self, value: Tensor) -> Tensor:
        """As in World."""
        self.summed.append(value.nbytes)
        return super().sum(value)


def network(s: Shapes, classes: int, number: int = 0) -> ImageNetwork:
    """A ConvNet for these shapes."""
    settings = ImageNetworkConfig(width=s.width, depth=s.depth)
    return image_network(settings, 3, s.size, s.head or classes, 0, "benchmark", number)


def normaliser() -> Normaliser:
    """Of pixels around one half."""
    return Normaliser(torch.full((3,), 0.5), torch.full((3,), 0.25))


def ncfm(s: Shapes, classes: int, world: World) -> Job:
    """Condensation of the first `classes` classes."""
    gen = generator(0, "benchmark images")
    pixels = torch.randint(0, 256, (classes * s.batch_real, 3, s.size, s.size), generator=gen, dtype=torch.uint8)
    targets = torch.eye(s.head or classes)[:classes].repeat_interleave(s.batch_real, 0)
    nets = [network(s, classes, i).to(world.device) for i in range(2)]
    bank = TeacherBank(*([{k: v.detach().clone() for k, v in trainable(net).items()}] for net in nets))
    c = Condenser(
        nclass_list=[distribute_class(classes, rank=rank, size=world.size) for rank in range(world.size)],
        device=world.device, images=ImageSet(pixels, targets, s.size, normaliser()).to(world.device),
        settings=ImageCondenseConfig(
            niter=1, ipc=s.ipc, num_premodel=1, teacher_model_epoch=1, num_freqs=s.freqs, image_budget=256
        ),
        networks=(nets[0], nets[1]), bank=bank, batch_real=s.batch_real, seed=0, world=world, dataset="benchmark",
    )  # fmt: skip
    c.optimizer = make_optimizer(c.data, OptimizationConfig(optimizer="adam", lr_img=0.01), 1e-6)

    def iteration(number: int) -> None:
        c.prepare(number)
        c.match()
        c.calibrate()
        c.optimizer.step()
        c.optimizer.zero_grad()

    return iteration, c.learned


def trajectories(s: Shapes, classes: int, world: World, folder: Path, labelled: bool) -> Job:
    """A student of two steps on the whole set, with soft labels."""
    net, gen, side = network(s, classes), generator(0, "benchmark images"), s.size // 2**s.depth
    theta = flat_parameters(net)
    writer = ExpertWriter(
        expert_file(folder, 0),
        ExpertNotes(dataset="random", zca="", parameters=parameters_of(net), last=2, settings={}),
    )
    for epoch in range(3):
        writer.put(epoch, theta + epoch * 0.01 * theta.std() * torch.randn(theta.shape, generator=gen))
    writer.finish()
    owner = torch.arange(classes).repeat_interleave(s.ipc)
    start = SyntheticSet(
        torch.rand(len(owner), 3, s.size, s.size, generator=gen), torch.eye(s.head or classes)[owner], owner,
        features=torch.randn(1, len(owner), s.width, side, side, generator=gen) if labelled else None,
    )  # fmt: skip
    c = TrajectoryCondenser(
        settings=TrajectoryConfig(ipc=s.ipc, syn_steps=2, max_start_epoch=1, soft_labels=True, memory_budget=0),
        feature=FeatureConfig() if labelled else None, start=start, normaliser=normaliser(), network=net,
        map_shape=(s.width, side, side), experts=ExpertBuffer(folder), seed=0, world=world, meta={},
    )  # fmt: skip
    return c.iterate, c.learned


def state_bytes(learned: Mapping[str, Rows], world: World) -> int:
    """Bytes of all ranks' rows and moments, as a checkpoint has them."""
    total = 0
    for part in learned.values():
        own = part.own.nbytes + sum(v.nbytes for v in part.optimizer.state[part.own].values() if v is not None)
        total += own if part.owners is None else int(world.sum(torch.tensor([own])))
    return total


def measure(method: str, s: Shapes, classes: int, rounds: int, world: Counted) -> None:
    """Print one line."""
    with TemporaryDirectory() as name:
        job = ncfm(s, classes, world) if method == "ncfm" else trajectories(
            s, classes, world, Path(name), method == "features"
        )  # fmt: skip
        iteration, learned = job
        world.summed.clear()
        with FlopCounterMode(display=False) as counter:
            iteration(0)  # which also warms up
        summed = sum(world.summed)
        flops = sum(world.gather_values(counter.get_total_flops()))
        taken: list[tuple[float, float]] = []
        for number in range(1, rounds + 1):
            world.barrier()
            began = time.process_time()
            wall = seconds(lambda number=number: iteration(number), world.device)  # type: ignore[misc]
            taken.append((wall, time.process_time() - began))
        slowest = [map(max, zip(*times, strict=True)) for times in zip(*world.gather_values(taken), strict=True)]
        wall, cpu = map(statistics.median, zip(*slowest, strict=True))
        state = state_bytes(learned, world)
    if world.main:
        print(
            f"{method}, {classes} classes, {world.size} ranks: {wall:.3f} s wall, {cpu:.3f} s CPU, "
            f"{1e3 * cpu / classes:.1f} ms CPU and {1e-9 * flops / classes:.3f} GFLOP a class; summed "
            f"{1e-6 * summed:.2f} MB, state {1e-6 * state:.2f} MB, "
            f"peak {1e-6 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:.2f} GB",
            flush=True,
        )


def paper(classes: int, ranks: int) -> None:
    """Print bytes from shapes alone: what every rank holds, gives to all-reduces in an iteration, and what is saved."""
    s = FULL
    n, image = classes * s.ipc, 4 * 3 * s.size**2
    width = s.width * (s.size // 2**s.depth) ** 2  # D, of the features
    weights = 4 * sum(p.numel() for p in network(replace(s, head=0), classes).parameters())
    labels, maps = 4 * n * classes, 4 * n * width
    # A leaf stands beside its moments, the gradients of a student, their sum, and the mean that moves it.
    trajectory, features = 5 * (n * image + labels), 6 * maps
    summed = n * image + labels + 2 * PUBLISHED_STEPS * weights  # and, step by step, gradients and adjoints
    sizes = {
        "real images, uint8": IMAGES * classes * 3 * s.size**2,
        "real labels, one-hot": 4 * IMAGES * classes**2,
        "ncfm: rows, gradient, Adam": 4 * n * image / ranks,
        "ncfm: features of the real images": 4 * classes * s.batch_real * width,
        "ncfm: 20 teachers, 2 networks": 42 * weights,
        "ncfm: summed an iteration": 4 * classes * s.batch_real * width,
        "ncfm: state": 3 * n * image,
        "datm: set, moments, gradients": trajectory,
        "datm: summed an iteration": summed,
        "datm: state": 2 * (n * image + labels),
        "features: set, moments, gradients": trajectory + features,
        "features: summed an iteration": summed + maps,
        "features: state": 2 * (n * image + labels) + 3 * maps,
    }
    print(f"{classes} classes, {ranks} ranks, {s}, weights {1e-6 * weights:.2f} MB; GB on every rank:")
    for name, size in sizes.items():
        print(f"{1e-9 * size:10.2f}  {name}")


def command_line() -> Parser:
    """Its options."""
    parser = bench_parser(__doc__, rounds=3)
    add, numbers = parser.add_argument, partial(parser.add_argument, type=positive, metavar="N")
    numbers("--classes", nargs="+", default=[10, 20, 40, 80], help="numbers of classes (default: 10 20 40 80)")
    add("--methods", choices=METHODS, nargs="+", default=METHODS, help="what to time (default: all)")
    numbers("--ipc", help="samples per class (default: 10, with --full 50)")
    add("--full", action="store_true", help="time ImageNet-1K at 64 pixels, some of its 1000 classes")
    add("--paper", action="store_true", help="print bytes at ImageNet's shapes and run nothing")
    numbers("--ranks", default=8, help="ranks of --paper (default: 8)")
    return parser


def main() -> int:
    """Print a line for every method and number of classes."""
    parser = command_line()
    args = parser.parse_args()
    if args.paper:
        for classes in args.classes:
            paper(classes, args.ranks)
        return 0
    base = FULL if args.full else Shapes()
    shapes = replace(base, ipc=args.ipc or base.ipc)
    with process_group(device_of(parser, args.device)) as world:
        counted = Counted(world.rank, world.size, world.device)
        if world.main:
            print(f"{world.device}, {torch.get_num_threads()} threads: {shapes}", flush=True)
        for method in args.methods:
            for classes in args.classes:
                measure(method, shapes, classes, args.rounds, counted)
    return 0


if __name__ == "__main__":
    leave(main())
