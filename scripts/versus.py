"""A plain per-class loop against our condenser: the same gradients in float64, then seconds in alternating rounds."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from condenser.matching import ClassCondenser
from config.cli import Parser, positive
from NCFM.cf_loss import frequencies
from utils.ddp import choose_device
from utils.streams import generator
from utils.teachers import update_feature_extractor

Step = Callable[[], None]
SIDES = ("plain", "ours")


@dataclass(frozen=True)
class Side:
    """A condenser with its optimiser and how its two losses put gradients into the rows; the sums come back."""

    condenser: ClassCondenser
    optimizer: torch.optim.Optimizer
    match: Callable[[int, Step], float]
    calibrate: Callable[[int, Step], float]
    plain: bool

    def step(self) -> None:
        """A step of the whole tensor."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def ours(c: ClassCondenser, optimizer: torch.optim.Optimizer) -> Side:
    """Our side: all classes, then one step."""

    def match(number: int, step: Step) -> float:
        total = c.match().total
        step()
        return total

    def calibrate(number: int, step: Step) -> float:
        total = c.calibrate().total
        step()
        return total

    return Side(c, optimizer, match, calibrate, plain=False)


def textbook(real: Tensor, syn: Tensor, t: Tensor) -> Tensor:
    """Amplitude and phase loss as the paper writes it, each projection computed for its cosine and for its sine."""
    parts = []
    for x in (F.normalize(real), F.normalize(syn)):
        parts += [torch.cos(x @ t.T).mean(0), torch.sin(x @ t.T).mean(0)]
    re, im, re_s, im_s = parts
    a, a_s = (re**2 + im**2).sqrt(), (re_s**2 + im_s**2).sqrt()
    amplitude, phase = (a - a_s) ** 2, 2 * (a * a_s - re * re_s - im * im_s)
    return (0.5 * amplitude + 0.5 * phase.clamp(min=1e-12)).sqrt().mean()


def frequencies_of(c: ClassCondenser, number: int) -> Tensor:
    """Frequencies [L, F, D] of iteration `number`, as the condenser draws them."""
    gen = generator(c.seed, "frequencies", number, device=c.device)
    return frequencies(c.feature_shape, c.settings.freq_scales, gen, c.data.detach())


def set_teachers(c: ClassCondenser, number: int) -> None:
    """Load the teachers of iteration `number`, as the condenser does."""
    stream = generator(c.seed, "teacher", number)
    update_feature_extractor(c.bank, c.model_final, c.model_interval, stream, *c.settings.interpolation)


def difference(plain: Side, mine: Side) -> float:
    """Largest relative difference of a loss or of a row's gradient between the two sides, printed (use float64)."""

    def measured(side: Side, run: Callable[[int, Step], float]) -> tuple[float, Tensor]:
        data = side.condenser.data
        data.grad = torch.zeros_like(data)
        return run(0, lambda: None), data.grad.flatten(1)

    mine.condenser.prepare(0)
    worst = 0.0
    for name in ("match", "calibrate"):
        loss, rows = measured(mine, getattr(mine, name))
        want, want_rows = measured(plain, getattr(plain, name))
        apart = abs(loss - want) / want
        rows_apart = float(((rows - want_rows).norm(dim=1) / want_rows.norm(dim=1)).max())
        print(f"float64 {name}: relative difference of loss {apart:.1e}, of a row's gradient {rows_apart:.1e}")
        worst = max(worst, apart, rows_apart)
    return worst


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def time_side(side: Side, number: int) -> dict[str, float]:
    """Seconds of the parts of one iteration: `match` and `calib` with their steps, and `build`, our real side."""
    device, c = side.condenser.device, side.condenser
    times = {} if side.plain else {"build": seconds(lambda: c.prepare(number), device)}
    times["match"] = seconds(lambda: side.match(number, side.step), device)
    times["calib"] = seconds(lambda: side.calibrate(number, side.step), device)
    return times


def peak_alone(module: str, side: str) -> float:
    """Peak memory in GB of a side's first iteration in a process of its own, started with our arguments."""
    words = [sys.executable, "-m", module, *sys.argv[1:], "--only", side]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def peak(side: Side) -> float:
    """Peak memory in GB of this process (of its device, if that is a GPU) after one iteration of a side."""
    time_side(side, 0)
    if side.condenser.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rounds(count: int, sides: dict[str, Side]) -> None:
    """Time the sides in turn, `count` rounds after one to warm up; print every round, medians and ratios to `plain`."""
    taken: list[dict[str, dict[str, float]]] = []
    for number in range(count + 1):
        found = {name: time_side(side, number) for name, side in sides.items()}
        parts = (f"{side} {name} {value:.3f} s" for side, times in found.items() for name, value in times.items())
        print(f"round {number}: " + ", ".join(parts), flush=True)
        taken += [found] if number else []
    for title, names in (("matching", ("match",)), ("matching and calibration", ("match", "calib"))):
        plain = [sum(found["plain"][name] for name in names) for found in taken]
        print(f"{title}: plain loop {statistics.median(plain):.3f} s/iteration")
        for side in [name for name in sides if name != "plain"]:
            report(side, plain, [found[side] for found in taken], names)


def report(side: str, plain: Sequence[float], taken: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    """Print a side's medians and ratios: its real side built in every iteration, in one of ten, or at hand."""
    for mode, build in (("exact", 1.0), ("refresh 10", 0.1), ("cached", 0.0)):
        own = [sum(found[name] for name in names) + build * found["build"] for found in taken]
        ratios = [a / b for a, b in zip(plain, own, strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]"
        print(f"  {side}, {mode}: {statistics.median(own):.3f} s/iteration, plain / this {spread}", flush=True)


def bench_parser(doc: str | None, rounds: int) -> Parser:
    """The command line that every benchmark begins with."""
    parser = Parser(doc)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU if there is one)")
    text = f"rounds to time, after one to warm up (default: {rounds})"
    parser.add_argument("--rounds", type=positive, metavar="N", default=rounds, help=text)
    return parser


def device_of(parser: Parser, given: str | None) -> torch.device:
    """What --device means here; a usage error where there is none such."""
    if given == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    return torch.device("cpu") if given == "cpu" else choose_device(None)
