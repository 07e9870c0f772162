"""Our gradient of a whole student against plain loops, on random CIFAR-size images: seconds, memory, an expert's draw.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m scripts.bench_trajectory --device cpu --rounds 5

A student takes `--steps` steps of 100 images; ConvNet-3 of width 128, one DSA operation a step. unroll: every update
with its graph, then one backward pass (MTT). two_pass: first order as published (TESLA), a pass for gradients, which
makes graphs that nobody reads, then a step at a time again. exact, tesla: ours, nothing kept; exact_kept: ours with
`--memory_budget`. All sides have the same network, images, views and threads, and each a process of its own, with our
allocator settings or (`--glibc`) without; first their gradients are compared in float64. Memory is what a process with
glibc's allocator takes above what it had before.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from condenser.feature_labels import FeatureConfig
from condenser.synthetic_set import SyntheticSet
from condenser.trajectory import flat_parameters
from condenser.trajectory_condenser import Start, TrajectoryCondenser, TrajectoryConfig
from config.cli import Parser, positive
from scripts.versus import bench_parser, device_of, seconds
from utils.augment import draw_augmentation
from utils.ddp import World, process_group
from utils.expert_buffers import ExpertBuffer, ExpertNotes, ExpertWriter, expert_file, parameters_of
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.program import leave
from utils.streams import generator


@dataclass(frozen=True)
class Shapes:
    """Sizes of one benchmark."""

    width: int = 128
    size: int = 32
    classes: int = 10
    ipc: int = 10


TINY = Shapes(8, 8, 3, 2)
EPOCHS = 51  # of an expert whose snapshots are drawn
LBD = 0.1
Gradients = tuple[Tensor, ...]  # by images, labels if there are any, and step size


def network(s: Shapes) -> ImageNetwork:
    """Experts' and student's."""
    return image_network(ImageNetworkConfig(width=s.width), 3, s.size, s.classes, 0, "benchmark")


def write_expert(folder: Path, s: Shapes, epochs: int) -> ExpertBuffer:
    """An expert on a straight way from random weights to others."""
    net, gen = network(s), generator(0, "benchmark expert")
    notes = ExpertNotes(dataset="random", zca="", parameters=parameters_of(net), last=epochs - 1, settings={})
    writer, theta = ExpertWriter(expert_file(folder, 0), notes), flat_parameters(net)
    step = 0.01 * theta.std() * torch.randn(theta.shape, generator=gen)
    for epoch in range(epochs):
        writer.put(epoch, theta + epoch * step)
    writer.finish()
    return ExpertBuffer(folder)


def make(
    s: Shapes, settings: TrajectoryConfig, world: World, dtype: torch.dtype = torch.float32, labelled: bool = False
) -> tuple[TrajectoryCondenser, Start]:
    """Our condenser on random images, and a student of it."""
    gen, side = generator(0, "benchmark images"), s.size // 8
    owner = torch.arange(s.classes).repeat_interleave(s.ipc)
    pixels = torch.rand(len(owner), 3, s.size, s.size, generator=gen).to(dtype)
    labels = torch.randn(1, len(owner), s.width, side, side, generator=gen).to(dtype)
    start = SyntheticSet(
        pixels, torch.eye(s.classes, dtype=dtype)[owner], owner, None, {}, labels if labelled else None
    )
    with TemporaryDirectory() as folder:
        condenser = TrajectoryCondenser(
            settings=settings, feature=FeatureConfig(lbd=LBD) if labelled else None, start=start,
            normaliser=Normaliser(torch.full((3,), 0.5, dtype=dtype), torch.full((3,), 0.25, dtype=dtype)),
            network=network(s).to(dtype), map_shape=(s.width, side, side), experts=write_expert(Path(folder), s, 3),
            seed=0, world=world, meta={},
        )  # fmt: skip
        drawn = condenser.draw(0, 0)
    return condenser, replace(drawn, theta=drawn.theta.to(dtype), target=drawn.target.to(dtype))


def config(steps: int, budget: float, tesla: bool = False, micro: int | None = None) -> TrajectoryConfig:
    """Students of so many steps on the whole set, from an expert's start to its second epoch."""
    return TrajectoryConfig(
        ipc=10, syn_steps=steps, max_start_epoch=1, mode="tesla" if tesla else "exact", memory_budget=budget,
        micro_batch=micro,
    )  # fmt: skip


def view(c: TrajectoryCondenser, start: Start, step: int, x: Tensor) -> Tensor:
    """The images [B, C, H, W] of a step as its student sees them."""
    return draw_augmentation(c.settings.aug_type, len(x), generator(c.seed, "student's view", *start.number, step))(x)


def plain_loss(c: TrajectoryCondenser, theta: Tensor, x: Tensor, ids: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of a student at theta [P], and the distance of its last map from labels [B, 1, C, H, W] if any."""
    parameters = dict(c.net.named_parameters())
    parts = theta.split([p.numel() for p in parameters.values()])
    values = {name: w.view_as(p) for (name, p), w in zip(parameters.items(), parts, strict=True)}
    output = functional_call(c.net, values, (x,))
    loss = F.cross_entropy(output.logits, c.targets[ids].argmax(1))
    return loss + sum(LBD * F.mse_loss(output.features[0], rows.flatten(1)) for rows in labels)


def unroll(c: TrajectoryCondenser, start: Start) -> Gradients:
    """Through all updates at once."""
    alpha, theta = c.alpha.detach().to(start.theta).requires_grad_(), start.theta.clone().requires_grad_()
    images, *labels = c.leaves
    for step, ids in enumerate(start.batches):
        x = view(c, start, step, images[ids])
        loss = plain_loss(c, theta, x, ids, [rows[ids] for rows in labels])
        theta = theta - alpha * torch.autograd.grad(loss, theta, create_graph=True)[0]
    value = (theta - start.target).square().sum() / (start.theta - start.target).square().sum()
    return torch.autograd.grad(value, (*c.leaves, alpha))


def two_pass(c: TrajectoryCondenser, start: Start) -> Gradients:
    """First order: all gradients with graphs that are thrown away, their sum, and every step again."""
    alpha, path, total = float(c.alpha.detach()), [start.theta.clone().requires_grad_()], torch.zeros_like(start.theta)
    seen: list[tuple[Tensor, list[Tensor]]] = []
    for step, ids in enumerate(start.batches):
        rows = [leaf[ids] for leaf in c.leaves]
        seen.append((view(c, start, step, rows[0]), rows))
        loss = plain_loss(c, path[-1], seen[-1][0], ids, rows[1:])
        g = torch.autograd.grad(loss, path[-1], create_graph=True, retain_graph=True)[0].detach().clone()
        total += g
        path.append((path[-1].detach() - alpha * g).requires_grad_())
    scale = (start.theta - start.target).square().sum()
    sums = [torch.zeros_like(leaf) for leaf in c.leaves]
    for theta, ids, (x, rows) in zip(path, start.batches, seen, strict=False):
        loss = plain_loss(c, theta, x, ids, rows[1:])
        g = torch.autograd.grad(loss, theta, create_graph=True, retain_graph=True)[0]
        slope = (alpha * (start.target - start.theta) + alpha**2 * total) @ g * (2 / scale)
        for whole, share in zip(sums, torch.autograd.grad(slope, rows), strict=True):
            whole.index_add_(0, ids, share)
    return *sums, -2 / scale * (path[-1].detach() - start.target) @ total


def ours(c: TrajectoryCondenser, start: Start) -> Gradients:
    """By the condenser. Raises ValueError where the student went astray."""
    found = c.match(start).gradients
    if found is None:
        raise ValueError("the student's loss is not finite")
    return found


def compare(world: World) -> float:
    """Largest relative difference of a gradient between ours and the plain loops, in float64, printed."""
    worst = 0.0
    sides = {
        "exact, micro-batches": (unroll, config(5, 0.0, micro=4)),
        "exact, kept graphs": (unroll, config(5, 1.0)),
        "tesla": (two_pass, config(5, 0.0, tesla=True)),
    }
    for name, (plain, settings) in sides.items():
        c, start = make(TINY, settings, world, torch.float64, labelled=True)
        pairs = zip(("images", "labels", "step size"), ours(c, start), plain(c, start), strict=True)
        apart = {leaf: float((mine - other).norm() / other.norm()) for leaf, mine, other in pairs}
        print(f"float64, {name}: relative difference by " + ", ".join(f"{leaf} {v:.1e}" for leaf, v in apart.items()))
        worst = max(worst, *apart.values())
    return worst


def side(name: str, steps: int, budget: float, world: World) -> tuple[Callable[[], Gradients], TrajectoryCondenser]:
    """What a side does for one student, and its condenser."""
    settings = config(steps, budget if name == "exact_kept" else 0.0, tesla=name == "tesla")
    c, start = make(Shapes(), settings, world)
    return partial({"unroll": unroll, "two_pass": two_pass}.get(name, ours), c, start), c


PLAIN = ("unroll", "two_pass")
SIDES = (*PLAIN, "exact", "exact_kept", "tesla")


def start_side(name: str, what: str, steps: int, glibc: bool) -> subprocess.Popen[str]:
    """A process of a side's own, so that none finds the heap as another left it, with our allocator or glibc's."""
    words = [sys.executable, "-m", "scripts.bench_trajectory", *sys.argv[1:], "--only", name, "--what", what]
    env = os.environ | ({"MALLOC_ARENA_MAX": "64"} if glibc else {})  # any such variable keeps ours away
    return subprocess.Popen(
        [*words, "--steps", str(steps)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve(name: str, steps: int, budget: float, world: World) -> None:
    """Run a side to warm up, then for every line that comes in; print the seconds of each, wall and CPU."""
    run = side(name, steps, budget, world)[0]
    for _ in chain([""], sys.stdin):
        began = time.process_time()
        wall = seconds(run, world.device)
        print(wall, time.process_time() - began, flush=True)


def time_sides(steps: int, rounds: int, glibc: Sequence[str]) -> None:
    """Time the sides in turn; print medians of both clocks, and the plain sides over ours in the same rounds."""
    found: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        runs = dict[str, tuple[IO[str], IO[str]]]()
        for name in SIDES:
            process = stack.enter_context(start_side(name, "time", steps, name in glibc))
            if process.stdin and process.stdout:
                runs[name] = process.stdin, process.stdout
                process.stdout.readline()
        for number in range(rounds):
            for name in sorted(runs, reverse=bool(number % 2)):  # each first in every other round
                ask, answer = runs[name]
                print(file=ask, flush=True)
                found[name].append([float(word) for word in answer.readline().split()])
            print(f"round {number}: " + ", ".join(f"{name} {found[name][-1][0]:.2f} s" for name in SIDES), flush=True)
    for name in SIDES:
        words = []
        for clock, title in enumerate(("wall", "CPU")):
            own = [pair[clock] for pair in found[name]]
            words.append(f"{title} {statistics.median(own):.2f} s")
            for plain in () if name in PLAIN else PLAIN:
                ratios = [pair[clock] / mine for pair, mine in zip(found[plain], own, strict=True)]
                spread = f"[{min(ratios):.2f} - {max(ratios):.2f}]"
                words.append(f"{plain} / this {statistics.median(ratios):.2f} {spread}")
        print(f"{steps} steps, {name}: " + ", ".join(words), flush=True)


def peak(name: str, steps: int, budget: float, world: World) -> tuple[float, float]:
    """GB that one student of a side takes above what the process (on a GPU: its device) had, and our estimate."""
    cuda = world.device.type == "cuda"

    def most() -> float:
        if cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return 1024e-9 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    tiny = make(TINY, config(2, 0.0), world)
    for plain in (unroll, two_pass, ours):  # loads what every side needs
        plain(*tiny)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    base = most()
    run, c = side(name, steps, budget, world)
    run()
    return most() - base, c.memory.peak(c.keep) / 1e9


def peaks() -> None:
    """Print the peak memory of every side with glibc's allocator."""
    for name, steps in (("unroll", 10), *((name, steps) for name in SIDES[1:] for steps in (10, 40))):
        print(start_side(name, "memory", steps, glibc=True).communicate()[0].splitlines()[-1], flush=True)


def time_draw() -> None:
    """Print the milliseconds in which two snapshots of an expert are read."""
    with TemporaryDirectory() as folder:
        experts, gen = write_expert(Path(folder), Shapes(), EPOCHS), generator(0, "benchmark draw")
        taken = list[float]()
        for _ in range(50):
            epoch, began = int(torch.randint(EPOCHS - 2, (1,), generator=gen)), time.perf_counter()
            for t in (epoch, epoch + 2):
                experts.draw(0, t)
            taken.append(1e3 * (time.perf_counter() - began))
    shape, spread = "{} x {}".format(*experts.notes.shape), f"[{min(taken):.1f} - {max(taken):.1f}]"
    print(f"two snapshots of an expert {shape}: {statistics.median(taken):.1f} ms {spread}", flush=True)


def command_line() -> Parser:
    """Its options."""
    parser = bench_parser(__doc__, rounds=5)
    add, parts, of_glibc = parser.add_argument, ("memory", "time", "draw"), ("none", "plain", "all")
    add("--steps", type=positive, metavar="N", default=10, help="steps of the student that is timed (default: 10)")
    add("--memory_budget", type=float, metavar="GB", default=4.0, help="what exact_kept may take (default: 4)")
    add("--what", choices=parts, nargs="+", default=list(parts), help="what to measure (default: all)")
    add("--glibc", choices=of_glibc, default="none", help="sides timed with glibc's allocator (default: none)")
    add("--only", choices=SIDES, help="print the peak memory of one side, or with --what time serve its times")
    return parser


def main() -> int:
    """Print the numbers; exit status 1 if the sides disagree."""
    parser = command_line()
    args = parser.parse_args()
    if args.memory_budget < 0:
        parser.error(f"--memory_budget: {args.memory_budget:g} GB; 0 or more")
    device = device_of(parser, args.device)
    if "memory" in args.what and not args.only:  # first of all: a process inherits the peak of the one that starts it
        peaks()
    with process_group(device) as world:
        if args.only and args.what == ["time"]:
            serve(args.only, args.steps, args.memory_budget, world)
            return 0
        if args.only:
            found, estimate = peak(args.only, args.steps, args.memory_budget, world)
            said = "" if args.only in PLAIN else f", estimate {estimate:.3f} GB"
            print(f"peak memory, {args.steps} steps, {args.only}: {found:.3f} GB{said}")
            return 0
        if compare(world) > 1e-10:
            return 1
        print(f"{device}, {torch.get_num_threads()} threads: {Shapes()}, budget {args.memory_budget:g} GB", flush=True)
    if "time" in args.what:
        time_sides(args.steps, args.rounds, {"none": (), "plain": PLAIN, "all": SIDES}[args.glibc])
    if "draw" in args.what:
        time_draw()
    return 0


if __name__ == "__main__":
    leave(main())
