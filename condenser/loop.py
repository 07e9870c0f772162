"""The learning loop of every method: iterate, log, score, save, resume; ranks share out the rows that are learned."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from condenser.synthetic_set import SyntheticSet
from config import ConfigError, LocalPath, Section
from utils.augment import AugType
from utils.checkpoint import keep_state, last_state
from utils.ddp import World, sync_distributed_metric
from utils.progress import Progress
from utils.report import loss_curve
from utils.run_folder import RunFolder, keep_batch, log
from utils.stopping import StopFlag, Stopped

NOT_CURVES = ("iteration", "scale_low", "scale_mean", "scale_high")


class LoopConfig(Section):
    """Length and rhythm of the loop."""

    niter: int = Field(ge=0)
    save_every: int = Field(200, ge=1)  # iterations between syn_data_*.pth
    checkpoint_every: int = Field(20, ge=1)  # iterations between states to resume from
    val_every: int = Field(0, ge=0)  # iterations between held-out scores; 0 = none, then best is last


class SetConfig(LoopConfig):
    """The set that is learned, and how its images start and move."""

    ipc: int = Field(ge=1)
    init: Literal["real", "correct", "noise", "load"] = "real"  # correct: real ones that experts get right
    load_path: LocalPath | None = None
    learn_images: bool = True
    lr_img: float = Field(0.1, gt=0)
    mom_img: float = Field(0.5, ge=0, lt=1)
    aug_type: AugType = "none"  # DSA, as in color/crop/cutout/flip/scale/rotate

    @model_validator(mode="after")
    def check_start(self) -> "SetConfig":
        """A start from a file names it."""
        if self.init == "load" and self.load_path is None:
            raise ValueError("load_path: required for init: load; name a syn_data_*.pth")
        return self


@dataclass(frozen=True)
class Rows:
    """One learned tensor: this rank's rows, a leaf [n, ...], who moves them, and every rank's places in the whole, or
    None where each rank has the whole and moves it alike."""

    own: Tensor
    optimizer: torch.optim.Optimizer
    owners: list[list[int]] | None


def gathered(world: World, rows: Tensor, owners: list[list[int]] | None) -> Tensor | None:
    """Every rank's rows [N, ...] on the CPU of rank 0, else None."""
    if owners is None:
        return rows.detach().cpu() if world.main else None
    return world.gather_rows(rows, owners)


class Learner(ABC):
    """What a method gives to the loop: its learned rows on this rank, and an iteration on them."""

    settings: LoopConfig
    world: World

    @property
    @abstractmethod
    def learned(self) -> dict[str, Rows]:
        """The learned tensors by name."""

    @abstractmethod
    def iterate(self, done: int) -> dict[str, float]:
        """Iteration number `done`: this rank's sums of what is logged, and under `count` what they are divided by."""

    @abstractmethod
    def gather(self) -> SyntheticSet | None:
        """The whole set on rank 0."""

    def seen(self, done: int) -> dict[str, Any]:
        """Plain names of what iteration number `done` saw on this rank: classes, sample ids."""
        return {}

    def logged(self) -> dict[str, float]:
        """What is logged besides, the same on every rank."""
        return {}

    def state(self) -> dict[str, Any]:
        """What to resume from besides the rows, the same on every rank."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a `state()`."""
        return


Score = Callable[[SyntheticSet], float]


def learning_loop(learner: Learner, run: RunFolder, flag: StopFlag, score: Score, debug: bool) -> dict[str, float]:
    """Learn the set, from the last state of the run folder if there is one; returns the final numbers.

    Raises Stopped after a signal (with the state saved) and ConfigError when a logged sum is no longer finite.
    """
    s, world = learner.settings, learner.world
    state_file = run.folder / "state.pth"
    done, best = resume(learner, state_file)
    run.rewind(done)
    if done == 0:
        save_set(learner, run.folder, "0")
    else:
        log.info(f"resumed at iteration {done} of {s.niter}")
    progress = Progress("condense", s.niter, done, world.main)
    while done < s.niter:
        own = learner.iterate(done)
        done += 1
        sums = sync_distributed_metric({**own, "stop": float(flag.number)})
        stop, count = int(sums.pop("stop")), sums.pop("count")
        values = {"iteration": done, **{name: value / count for name, value in sums.items()}}
        if not all(map(math.isfinite, sums.values())):
            batches = world.gather_values(learner.seen(done - 1))
            file = keep_batch(run.folder, done, batches) if world.main else run.folder
            raise ConfigError(
                f"iteration {done}: the loss is not finite; the last saved state is kept, what was seen stands in "
                f"{file}: lower lr_img (and lr_feat)"
            )
        note = " ".join(f"{name} {values[name]:.3f}" for name in own if name != "count")
        values |= learner.logged()
        last = done == s.niter
        if last or done % s.save_every == 0:
            save_set(learner, run.folder, str(done))
        if s.val_every and (last or done % s.val_every == 0):
            held_out = measure(learner, run.folder, score, best)
            values["val_micro"], best = held_out, max(best, held_out)
        run.metric(**values)
        progress.step(note=note)
        if debug:
            log.debug(" ".join(f"{name} {value:.6g}" for name, value in values.items()))
        if last or stop or done % s.checkpoint_every == 0:
            save_state(learner, state_file, done, best)
        if stop:
            raise Stopped(max(world.gather_values(flag.number)))
    progress.close()
    if not s.val_every:
        save_set(learner, run.folder, "best")
    draw_curves(run)
    final = run.metrics()[-1] if world.main and s.niter else {}
    return final | ({"best_val_micro": best} if s.val_every else {})


def save_set(learner: Learner, folder: Path, name: str) -> None:
    """Write distilled_data/syn_data_{name}.pth."""
    whole = learner.gather()
    if whole:
        whole.save(folder / "distilled_data" / f"syn_data_{name}.pth")


def measure(learner: Learner, folder: Path, score: Score, best: float) -> float:
    """Held-out score of the set as it is; kept as `best` if there was no better one. Same value on every rank."""
    whole = learner.gather()
    value = score(whole) if whole else 0.0
    if whole and value > best:
        whole.save(folder / "distilled_data" / "syn_data_best.pth")
    return float(learner.world.broadcast(value))


def save_state(learner: Learner, path: Path, done: int, best: float) -> None:
    """One file for all ranks, from which any number of ranks can go on."""
    world = learner.world
    rows: dict[str, Tensor | None] = {}
    for name, part in learner.learned.items():
        moments = part.optimizer.state.get(part.own, {})
        rows[name] = gathered(world, part.own, part.owners)
        names = [(k, bool(v.ndim)) for k, v in moments.items() if isinstance(v, Tensor)]
        for moment, by_row in world.broadcast(names):
            own = moments[moment] if moments else torch.zeros(0)
            rows[f"{name} moment {moment}"] = gathered(world, own, part.owners) if by_row else own
    if world.main:
        keep_state(path, {"iteration": done, "best": best, "rows": rows, **learner.state()})


def resume(learner: Learner, path: Path) -> tuple[int, float]:
    """Load this rank's rows of the last readable state; returns (iterations done, best score)."""
    state = last_state(path) if learner.world.main else None
    if not learner.world.broadcast(state is not None):
        return 0, -1.0
    state = state or last_state(path)
    try:
        rows, done, best = state["rows"], int(state["iteration"]), float(state["best"])
        for name, part in learner.learned.items():
            whole, count = rows[name], len(part.own) if part.owners is None else sum(map(len, part.owners))
            own = list(range(count)) if part.owners is None else part.owners[learner.world.rank]
            if whole.shape != (count, *part.own.shape[1:]):
                raise KeyError(f"{name} of another shape")
            with torch.no_grad():
                part.own.copy_(whole[own])
            for key, value in rows.items():
                if own and key.startswith(f"{name} moment "):
                    moment = value[own].to(part.own.device) if value.ndim else value
                    part.optimizer.state[part.own][key.removeprefix(f"{name} moment ")] = moment
        learner.load_state(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{path}: not a state of this run ({error}): delete it, or start again with --overwrite"
        ) from error
    return done, best


def draw_curves(run: RunFolder) -> None:
    """images/loss_curve.png from metrics.jsonl."""
    if not run.world.main:
        return
    lines = run.metrics()
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name not in NOT_CURVES]
    series = {name: [(int(line["iteration"]), line[name]) for line in lines if name in line] for name in names}
    if series:
        loss_curve(run.folder / "images" / "loss_curve.png", series, "iteration", "value")
