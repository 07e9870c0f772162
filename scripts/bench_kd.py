"""Our step of teacher-student distillation against the step as publicly described, resnet32x4 to resnet8x4, M=[1,2,4].

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m scripts.bench_kd --device cpu --rounds 5

The plain step: teacher in float32 and NCHW, adaptive pooling to 4 x 4 and from there to 2 x 2 and 1, the classifier on
every region and once more on the mean, masks filled sample after sample, checks and scores read on the host, gradients
clipped, SGD. Ours is the trainer's, from the shipped file. Both have the same weights, views, threads and allocator
(ours, or glibc's if MALLOC_PERTURB_=0 is set); making views is in neither. First, losses and steps are compared in
float64, where ours takes COMPAT sdd_kd_lskd and the plain side clips nothing. Then the teacher folded and not, waits
for the device, ratios in alternating rounds (wall and CPU seconds), and a group of students on one teacher forward.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import add_args_from_yaml
from config.cli import Parser
from kd.kd_batches import Batches
from kd.kd_config import KdConfig
from kd.kd_data import KdData
from kd.losses import distillation_loss
from kd.methods.terms import Pass
from kd.student_run import StudentRun
from kd.teacher import KeptLogits, Teacher, regions_of
from scripts.versus import bench_parser, device_of, seconds
from utils.checkpoint import save_tensors
from utils.ddp import World, process_group
from utils.image_networks import ImageNetwork
from utils.kd_networks import kd_network
from utils.normaliser import Normaliser
from utils.program import leave
from utils.run_folder import REPOSITORY, RunFolder
from utils.streams import generator
from utils.utils_image import ImageSet

FILE = REPOSITORY / "config" / "kd" / "cifar100" / "sdd_kd_lskd" / "res32x4_res8x4.yaml"
PLAIN = "plain"
REPEATS = 10  # of head and loss alone, a round
Step = Callable[[], object]


@dataclass(frozen=True)
class Shapes:
    """Networks and sizes of one benchmark; images have 32 pixels a side."""

    teacher: str = "resnet32x4"
    student: str = "resnet8x4"
    batch: int = 64
    classes: int = 100


class Ours:
    """Teacher and student of the trainer on one random batch."""

    def __init__(self, s: Shapes, world: World, folder: Path, *overrides: str) -> None:
        gen = generator(0, "benchmark images")
        pixels = torch.randint(0, 256, (s.batch, 3, 32, 32), generator=gen, dtype=torch.uint8)
        labels = torch.randint(0, s.classes, (s.batch,), generator=gen)
        norm = Normaliser(torch.full((3,), 0.5), torch.full((3,), 0.25))
        images = ImageSet(pixels, F.one_hot(labels, s.classes).float(), 32, norm)
        data = KdData(tuple(map(str, range(s.classes))), images, None, images, 32, 4, True, False, "")
        self.original = kd_network(s.teacher, s.classes, 3, 32, 0, "benchmark teacher")
        with torch.no_grad():
            self.original(norm(pixels.float() / 255))  # running statistics of its norms
        save_tensors(folder / "teacher.safetensors", dict(self.original.state_dict()))
        self.original = self.original.to(world.device).eval()
        words = (f"DISTILLER.TEACHER={s.teacher}", f"DISTILLER.STUDENT={s.student}", f"SOLVER.BATCH_SIZE={s.batch}")
        cfg = add_args_from_yaml(KdConfig, FILE, (*words, *overrides), REPOSITORY).config
        batches = Batches(data, cfg, world)
        bf16 = cfg.KD.TEACHER_DTYPE == "bfloat16"
        self.teacher = Teacher(s.teacher, folder / "teacher.safetensors", data, bf16, world.device)
        place = RunFolder(Path(tempfile.mkdtemp(dir=folder)), {}, world)
        self.run = StudentRun(cfg, place, data, batches, [self.teacher], world)
        place.end_log()
        keep = cfg.KD.CACHE_VIEWS > 0
        self.kept = KeptLogits(self.teacher, batches, [self.run.regions], shown=False) if keep else None
        batches.begin(0)
        self.batch = batches.get(0)
        self.x, self.labels = self.batch.x, self.batch.labels

    def step(self) -> None:
        """One step of the trainer."""
        kept, key = self.kept, self.run.regions
        said = kept.see(0, self.batch.ids) if kept else self.teacher.see(self.x, [key], self.run.learner.reads_maps)
        self.run.step(self.batch, [said[key]], 0)

    def maps(self) -> tuple[Tensor, Tensor]:
        """Last maps of teacher and student."""
        with torch.no_grad():
            return self.teacher.maps(self.x)[-1], self.run.net.layers(self.x.contiguous(memory_format=self.run.layout))[
                -1
            ]

    def head_and_loss(self, of_teacher: Tensor, of_student: Tensor) -> None:
        """What follows the last maps, and back to them."""
        cfg, key = self.run.cfg, self.run.regions
        with torch.no_grad():
            regions = regions_of(self.teacher.net, of_teacher, key)
        logits = regions_of(self.run.net, of_student.requires_grad_(), key)
        loss = distillation_loss(logits, regions, self.labels, cfg.loss)
        (cfg.weights[0] * F.cross_entropy(logits[:, :, 0], self.labels) + cfg.weights[1] * loss).backward()
        of_student.grad = None


class Plain:
    """The described step on the same batch, with the weights that ours has now."""

    def __init__(self, ours: Ours, teacher: ImageNetwork, clip: float = 40.0) -> None:
        self.cfg, self.x, self.labels, self.clip = ours.run.cfg, ours.x, ours.labels, clip
        self.teacher = deepcopy(teacher).to(memory_format=torch.contiguous_format)
        self.student = deepcopy(ours.run.net).to(memory_format=torch.contiguous_format)
        solver = self.cfg.SOLVER
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), solver.LR, solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
        )

    def losses(self, of_teacher: Tensor, of_student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, distillation loss and logits [B, K] from last maps."""
        with torch.no_grad():
            regions = classified(self.teacher, of_teacher)[1]
        logits, own = classified(self.student, of_student)
        extra = masked_loss(own, regions, self.labels, self.cfg.KD.TEMPERATURE)
        return F.cross_entropy(logits, self.labels), extra, logits

    def step(self) -> tuple[float, float]:
        """One step; its two losses."""
        self.student.train()
        with torch.no_grad():
            maps = self.teacher.layers(self.x)[-1]
        ce, extra, logits = self.losses(maps, self.student.layers(self.x)[-1])
        if extra.isnan() or extra.isinf():
            extra = torch.zeros_like(extra)
        weights = self.cfg.weights
        self.optimizer.zero_grad()
        (weights[0] * ce + weights[1] * extra).backward()
        torch.nn.utils.clip_grad_norm_([*self.student.parameters(), *self.teacher.parameters()], self.clip)
        self.optimizer.step()
        top = logits.topk(5).indices == self.labels[:, None]
        _ = (top[:, 0].float().mean().item(), top.any(1).float().mean().item())
        return ce.item(), extra.item()

    def head_and_loss(self, of_teacher: Tensor, of_student: Tensor) -> None:
        """What follows the last maps, and back to them."""
        ce, extra, _ = self.losses(of_teacher, of_student.requires_grad_())
        (self.cfg.weights[0] * ce + self.cfg.weights[1] * extra).backward()
        of_student.grad = None


def classified(net: ImageNetwork, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K], and of the regions 1, 2 x 2, 4 x 4 [N * B, K], region after region."""
    four = F.adaptive_avg_pool2d(maps, 4)
    two = F.adaptive_avg_pool2d(four, 2)
    cells = torch.cat([part.flatten(2) for part in (F.adaptive_avg_pool2d(two, 1), two, four)], 2)  # [B, C, N]
    return net.head(net.join(maps)), net.head(cells.permute(2, 0, 1).flatten(0, 1))


def masked_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Loss [] of rows [N * B, K]: mean of those as right as the whole image plus mean of the others.

    The masks of sample i are written to the rows i N ... (i + 1) N, although rows come region after region.
    """
    student, teacher = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (student, teacher))
    log_s, p_t = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    rows = F.kl_div(log_s, p_t, reduction="none").sum(1) * temperature**2
    count = len(rows) // len(target)
    right = teacher.argmax(1) == target.repeat(count)
    like, unlike = torch.zeros_like(right), torch.zeros_like(right)
    for i in range(len(target)):
        own = slice(i * count, (i + 1) * count)
        if right[i]:
            like[own], unlike[own] = right[own], ~right[own]
        else:
            like[own], unlike[own] = ~right[own], right[own]
    zero = rows.new_zeros(())
    return (rows[like].mean() if like.any() else zero) + (rows[unlike].mean() if unlike.any() else zero)


def compare(world: World, folder: Path) -> float:
    """Largest relative difference of a loss or of the step of a parameter, in float64, printed."""
    ours = Ours(Shapes("resnet14", "resnet8", 12, 6), world, folder, "COMPAT=sdd_kd_lskd")
    teacher, run = ours.teacher.net.double(), ours.run
    run.net.double()
    ours.x = ours.x.double()
    ours.batch = ours.batch._replace(x=ours.x)
    plain, before = Plain(ours, teacher, math.inf), [p.detach().clone() for p in run.net.parameters()]
    with torch.no_grad():  # Teacher.see has float32
        said = Pass(regions_of(teacher, teacher.layers(ours.x)[-1], run.regions), ours.x[:, 0, 0])
    run.step(ours.batch, [said], 0)
    ce, extra, _, count, _ = run.sums.tolist()
    losses = zip(plain.step(), (ce / count, extra / count / run.cfg.weights[1]), strict=True)
    loss_apart = max(abs(a - b) / abs(a) for a, b in losses)
    ends = zip(plain.student.parameters(), run.net.parameters(), before, strict=True)
    with torch.no_grad():
        step_apart = max(float((a - b).norm() / (a - start).norm()) for a, b, start in ends)
    print(f"float64: relative difference of a loss {loss_apart:.1e}, of a parameter's step {step_apart:.1e}")
    return max(loss_apart, step_apart)


class Waits(TorchDispatchMode):
    """Counts operations for whose result a GPU's host would wait."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself."""
        masks = args[1] if str(func).startswith("aten.index.Tensor") else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.count += by_mask or any(name in str(func) for name in self.NAMES)
        return func(*args, **(kwargs or {}))


def waits(world: World, folder: Path) -> dict[str, int]:
    """Waits in a step of either side: at 64 samples and 100 classes, of small networks."""
    small = Shapes("resnet8", "resnet8")
    ours, kept = Ours(small, world, folder), Ours(small, world, folder, "KD.CACHE_VIEWS=1")
    found = {}
    for name, side in ((PLAIN, Plain(ours, ours.original)), ("ours", ours), ("kept logits", kept)):
        with Waits() as counter:
            side.step()
        found[name] = counter.count
    return found


def repeat(step: Step) -> None:
    """Head and loss are short."""
    for _ in range(REPEATS):
        step()


def ratios(title: str, sides: dict[str, tuple[Step, str]], rounds: int, device: torch.device) -> None:
    """Time the sides (and their bars) in turn, forwards and back, after a round to warm up; print `plain` over each."""
    taken: list[dict[str, tuple[float, float]]] = []
    base, *_ = sides
    for number in range(rounds + 1):
        found: dict[str, tuple[float, float]] = {}
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.process_time()
            wall = seconds(sides[name][0], device)
            found[name] = (wall, time.process_time() - began)
        taken += [found] if number else []
    for name, (_, bar) in sides.items():
        parts = []
        for i, clock in enumerate(("wall", "CPU")):
            own = [t[base][i] / t[name][i] for t in taken]
            spread = f"{base} / this {statistics.median(own):.2f} [{min(own):.2f} - {max(own):.2f}]"
            parts.append(f"{clock} {statistics.median(t[name][i] for t in taken):.3f} s, {spread}")
        print(f"{title}, {name}: {'; '.join(parts)}{bar}", flush=True)


def command_line() -> Parser:
    """Its options."""
    return bench_parser(__doc__, rounds=5)


def main() -> int:
    """Print the numbers; exit status 1 if the two sides disagree."""
    parser = command_line()
    args = parser.parse_args()
    device = device_of(parser, args.device)
    with process_group(device) as world, tempfile.TemporaryDirectory() as name:
        return measure(world, Path(name), args.rounds)


def measure(world: World, folder: Path, rounds: int) -> int:
    """All numbers; exit status."""
    if compare(world, folder) > 1e-10:
        return 1
    shapes, device = Shapes(), world.device
    ours = Ours(shapes, world, folder)
    plain = Plain(ours, ours.original)
    with torch.no_grad():
        maps = ours.original.layers(ours.x)[-1]
        apart = float((ours.teacher.maps(ours.x)[-1] - maps).norm() / maps.norm())
    print(f"teacher with folded norms, channels last: relative difference of the last map {apart:.1e}")
    print("waits for the device in a step: " + ", ".join(f"{k} {v}" for k, v in waits(world, folder).items()))
    if apart > 1e-4:
        return 1
    kind = torch.backends.cpu.get_cpu_capability()
    print(f"{device}, {kind}, {torch.get_num_threads()} threads: {shapes}", flush=True)
    words = ("KD.TEACHER_DTYPE=bfloat16", "KD.CACHE_VIEWS=1", "SOLVER.CHANNELS_LAST=false")
    bf16, kept, shipped = (Ours(shapes, world, folder, word) for word in words)
    ratios("step", {
        PLAIN: (plain.step, ""),
        "float32": (ours.step, " (bar 1.15)"),
        "bf16 teacher": (bf16.step, " (bar 1.6)"),
        "kept logits": (kept.step, " (bar 2.8)"),
        "float32, student in NCHW": (shipped.step, ""),
    }, rounds, device)  # fmt: skip
    of_teacher, of_student = ours.maps()
    nchw = [maps.contiguous() for maps in (of_teacher, of_student)]
    ratios(f"head and loss, {REPEATS} times", {
        PLAIN: (partial(repeat, lambda: plain.head_and_loss(*nchw)), ""),
        "ours": (partial(repeat, lambda: ours.head_and_loss(of_teacher, of_student)), " (bar 2.5)"),
    }, rounds, device)  # fmt: skip
    group = [ours, *(Ours(shapes, world, folder, f"M=[{m}]") for m in ("1", "1,2"))]

    def apart_from_each_other() -> None:
        for member in group:
            member.step()

    def together() -> None:
        said = ours.teacher.see(ours.x, [member.run.regions for member in group], reads_maps=False)
        for member in group:
            member.run.step(ours.batch, [said[member.run.regions]], 0)

    ratios("three students", {
        "apart": (apart_from_each_other, ""),
        "one teacher forward": (together, ""),
    }, rounds, device)  # fmt: skip
    return 0


if __name__ == "__main__":
    leave(main())
