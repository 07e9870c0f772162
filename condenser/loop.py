"""The condensation loop of every modality: step, log, score, save, resume."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from condenser.synthetic_set import SyntheticSet
from config import ConfigError, Section
from NCFM.sampling_net import SamplingNet
from utils.checkpoint import load_pth, save_pth
from utils.ddp import World, sync_distributed_metric
from utils.progress import Progress
from utils.report import loss_curve
from utils.run_folder import RunFolder, log
from utils.stopping import StopFlag, Stopped

ADAM = ("adam", "adamw")


class OptimizationConfig(Section):
    """How the synthetic data moves."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr_img: float = Field(gt=0)
    mom_img: float = Field(0.5, ge=0, lt=1)  # momentum of sgd
    lr_scale_adam: float = Field(0.1, gt=0)  # factor on lr_img for adam and adamw
    weight_decay: float = Field(0.0, ge=0)
    lr_relative: bool = True  # rates are in units of the data's own scale (text: deviation of the word table)
    scheduler: Literal["cosine", "constant"] = "cosine"
    lr_sampling_net: float = Field(1e-3, gt=0)

    def rate(self, scale: float) -> float:
        """The optimiser's learning rate for data of this scale."""
        if self.optimizer in ADAM:  # a step is about lr, whatever the gradient
            return self.lr_img * self.lr_scale_adam * (scale if self.lr_relative else 1.0)
        return self.lr_img * (
            scale**2 if self.lr_relative else 1.0
        )  # x = scale u: du = lr dL/du is dx = lr scale^2 dL/dx


class LoopConfig(Section):
    """Length and rhythm of the loop."""

    niter: int = Field(ge=0)
    iter_calib: int = Field(1, ge=0)  # calibration steps an iteration
    joint_step: bool = False  # one step on the sum of both losses instead of one step for each
    save_every: int = Field(200, ge=1)  # iterations between syn_data_*.pth
    checkpoint_every: int = Field(20, ge=1)  # iterations between states to resume from
    val_every: int = Field(0, ge=0)  # iterations between held-out scores; 0 = none, then best is last


@dataclass(frozen=True)
class Losses:
    """Sum of a loss over the classes of one rank, and their number."""

    total: float
    count: int


class Problem(ABC):
    """What a modality gives to the loop: its rows on this rank and their gradients."""

    settings: LoopConfig
    world: World
    data: Tensor  # leaf [n, ...], this rank's rows
    mask: Tensor | None  # of text
    targets: Tensor
    sampling: SamplingNet | None

    @property
    @abstractmethod
    def row_owners(self) -> list[list[int]]:
        """Positions in the whole set of every rank's rows."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Unit of a relative learning rate."""

    @abstractmethod
    def prepare(self, iteration: int) -> None:
        """Get ready for an iteration."""

    @abstractmethod
    def match(self) -> Losses:
        """Add the matching gradient."""

    @abstractmethod
    def calibrate(self) -> Losses:
        """Add the calibration gradient."""

    @abstractmethod
    def assemble(self, data: Tensor, mask: Tensor | None, targets: Tensor) -> SyntheticSet:
        """The whole set from its gathered parts."""


Score = Callable[[SyntheticSet], float]


def condense_loop(
    self: Problem,
    optimization: OptimizationConfig,
    run: RunFolder,
    flag: StopFlag,
    score: Score,
    debug: bool = False,
) -> dict[str, float]:
    """Learn the set, from the last state of the run folder if there is one; returns the final numbers.

    Raises Stopped after a signal (with the state saved) and ConfigError when a loss is no longer finite.
    """
    s, world = self.settings, self.world
    optimizer = make_optimizer(self.data, optimization, optimization.rate(self.scale))
    ascent = None
    if self.sampling:
        ascent = torch.optim.Adam(self.sampling.parameters(), lr=optimization.lr_sampling_net)
    state_file = run.folder / "state.pth"
    done, best = resume(self, optimizer, ascent, state_file)
    run.rewind(done)
    if done == 0:
        save_set(self, run.folder, "0")
    else:
        log.info(f"resumed at iteration {done} of {s.niter}")
    progress = Progress("condense", s.niter, done, world.main)
    base = optimization.rate(self.scale)
    while done < s.niter:
        self.prepare(done)
        share = 0.5 * (1 + math.cos(math.pi * done / s.niter)) if optimization.scheduler == "cosine" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = base * share
        match, calib = iterate(self, optimizer, ascent)
        done += 1
        sums = sync_distributed_metric(
            {"match": match.total, "calib": calib.total, "count": match.count, "stop": float(flag.number)}
        )
        values = {
            "iteration": done,
            "match": sums["match"] / sums["count"],
            "calib": sums["calib"] / sums["count"],
        }
        if not math.isfinite(sums["match"] + sums["calib"]):
            raise ConfigError(
                f"iteration {done}: the loss is not finite; the last saved state is kept: lower optimization.lr_img"
            )
        if self.sampling:
            scales = self.sampling.scales().detach()
            values |= {
                "scale_low": float(scales.min()),
                "scale_mean": float(scales.mean()),
                "scale_high": float(scales.max()),
            }
        last = done == s.niter
        if last or done % s.save_every == 0:
            save_set(self, run.folder, str(done))
        if s.val_every and (last or done % s.val_every == 0):
            held_out = measure(self, run.folder, score, best)
            values["val_micro"], best = held_out, max(best, held_out)
        run.metric(**values)
        progress.step(note=f"match {values['match']:.3f} calib {values['calib']:.3f}")
        if debug:
            log.debug(" ".join(f"{name} {value:.6g}" for name, value in values.items()))
        stop = int(sums["stop"])
        if last or stop or done % s.checkpoint_every == 0:
            save_state(self, optimizer, ascent, state_file, done, best)
        if stop:
            raise Stopped(max(world.gather_values(flag.number)))
    progress.close()
    if not s.val_every:
        save_set(self, run.folder, "best")
    draw_curves(run)
    final = run.metrics()[-1] if world.main and s.niter else {}
    return {**final, "best_val_micro": best}


def iterate(
    self: Problem, optimizer: torch.optim.Optimizer, ascent: torch.optim.Optimizer | None
) -> tuple[Losses, Losses]:
    """One iteration: a step on each loss, or one on both."""
    optimizer.zero_grad()
    match = self.match()
    if not self.settings.joint_step:
        optimizer.step()
        optimizer.zero_grad()
    calib = Losses(0.0, match.count)
    for i in range(self.settings.iter_calib):
        calib = self.calibrate()
        if not self.settings.joint_step or i + 1 == self.settings.iter_calib:
            optimizer.step()
            optimizer.zero_grad()
    if self.settings.joint_step and not self.settings.iter_calib:
        optimizer.step()
    if ascent:
        ascent.step()
        ascent.zero_grad()
    return match, calib


def make_optimizer(data: Tensor, settings: OptimizationConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser of the synthetic data."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD([data], lr=lr, momentum=settings.mom_img, weight_decay=settings.weight_decay)
    # Second moments of a loss whose frequencies and teacher change at every step: a shorter memory than 0.999.
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind([data], lr=lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay)


def gather(self: Problem) -> SyntheticSet | None:
    """The whole set on rank 0."""
    parts = (self.data, self.targets) if self.mask is None else (self.data, self.targets, self.mask)
    whole = [part for part in (self.world.gather_rows(part, self.row_owners) for part in parts) if part is not None]
    return self.assemble(whole[0], whole[2] if len(whole) > 2 else None, whole[1]) if whole else None


def save_set(self: Problem, folder: Path, name: str) -> None:
    """Write distilled_data/syn_data_{name}.pth."""
    whole = gather(self)
    if whole:
        whole.save(folder / "distilled_data" / f"syn_data_{name}.pth")


def measure(self: Problem, folder: Path, score: Score, best: float) -> float:
    """Held-out score of the set as it is; kept as `best` if there was no better one. Same value on every rank."""
    whole = gather(self)
    value = score(whole) if whole else 0.0
    if whole and value > best:
        whole.save(folder / "distilled_data" / "syn_data_best.pth")
    return float(self.world.broadcast(value))


def save_state(
    self: Problem,
    optimizer: torch.optim.Optimizer,
    ascent: torch.optim.Optimizer | None,
    path: Path,
    done: int,
    best: float,
) -> None:
    """One file for all ranks, from which any number of ranks can go on."""
    moments = optimizer.state.get(self.data, {})
    names = self.world.broadcast([(k, bool(v.ndim)) for k, v in moments.items() if isinstance(v, Tensor)])
    rows = {"data": self.world.gather_rows(self.data, self.row_owners)}
    for name, by_row in names:
        own = moments[name] if moments else torch.zeros(0)
        rows[f"moment {name}"] = self.world.gather_rows(own, self.row_owners) if by_row else own
    if self.world.main:
        state: dict[str, Any] = {"iteration": done, "best": best, "rows": rows}
        if self.sampling and ascent:
            state["sampling"], state["ascent"] = self.sampling.state_dict(), ascent.state_dict()
        save_pth(path, state)


def resume(
    self: Problem, optimizer: torch.optim.Optimizer, ascent: torch.optim.Optimizer | None, path: Path
) -> tuple[int, float]:
    """Load this rank's rows of the last state; returns (iterations done, best score)."""
    if not self.world.broadcast(path.exists()):
        return 0, -1.0
    state = load_pth(path)
    own = self.row_owners[self.world.rank]
    try:
        rows, done, best = state["rows"], int(state["iteration"]), float(state["best"])
        whole = rows["data"]
        if whole.shape != (sum(map(len, self.row_owners)), *self.data.shape[1:]):
            raise KeyError("data of another shape")
        with torch.no_grad():
            self.data.copy_(whole[own])
        if own:
            for name, value in rows.items():
                if name != "data":
                    moment = value[own].to(self.data.device) if value.ndim else value
                    optimizer.state[self.data][name.removeprefix("moment ")] = moment
        if self.sampling and ascent:
            self.sampling.load_state_dict(state["sampling"])
            ascent.load_state_dict(state["ascent"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a state of this run ({error}): delete it, or start again with --overwrite"
        ) from error
    return done, best


def draw_curves(run: RunFolder) -> None:
    """images/loss_curve.png from metrics.jsonl."""
    if not run.world.main:
        return
    lines = run.metrics()
    names = [name for name in ("match", "calib", "val_micro") if any(name in line for line in lines)]
    series = {name: [(int(line["iteration"]), line[name]) for line in lines if name in line] for name in names}
    if series:
        loss_curve(run.folder / "images" / "loss_curve.png", series, "iteration", "value")
