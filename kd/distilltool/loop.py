"""One training loop for every distiller: what differs between them is which terms a batch has."""

import difflib
import inspect
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Generator, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from config import ConfigError
from kd.distilltool.adaptors import Adaptor, Place, Results, call, for_whom, move, read
from kd.distilltool.checkpoints import parts, random_state, save_points, set_random_state, steps_per_epoch
from kd.distilltool.projections import attach_group
from kd.distilltool.report import start_report, term_table
from kd.distilltool.settings import TrainingConfig
from kd.distilltool.step_log import StepLog
from kd.distilltool.terms import Term, total
from utils.checkpoint import keep_state, last_state, save_pth
from utils.ddp import World
from utils.progress import Progress

Callback = Callable[..., Any]  # callback(model=..., step=...)
Scheduler = LRScheduler | ReduceLROnPlateau | Callable[[Optimizer], LRScheduler] | None
RESUME = "resume.pt"
log = logging.getLogger("distill_lab")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel or DistributedDataParallel."""
    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def choose_device(wanted: str) -> torch.device:
    """The wanted device; the CPU, which is said, where there is no CUDA."""
    if torch.device(wanted).type == "cuda" and not torch.cuda.is_available():
        log.warning(f"device: {wanted}, but torch finds no CUDA: the CPU is used")
        return torch.device("cpu")
    return torch.device(wanted)


class Loop(ABC):
    """Trains `model` on the terms of its batches. A context: inside it teachers evaluate and the model trains."""

    def __init__(self, train_config: TrainingConfig, model: nn.Module, teachers: Mapping[str, nn.Module]) -> None:
        TrainingConfig.require(train_config, "train_config")
        self.train_config, self.trained, self.teachers = train_config, model, dict(teachers)
        self.device = choose_device(train_config.device)
        self.extra: list[tuple[nn.Module, Mapping[str, Any] | None]] = []  # trained too: options of their groups
        self.flags: list[tuple[nn.Module, bool]] | None = None  # as they were outside
        self.report = ""  # of the last training's start
        self.notes: list[str] = []

    @abstractmethod
    def terms(self, batch: Any, args: Mapping[str, Any]) -> list[Term]:
        """The terms of one batch as the loader gave it."""

    def count(self, dataloader: Any) -> int | None:
        """Batches of an epoch; None where the loader does not know."""
        try:
            return len(dataloader)
        except TypeError:
            return None

    def batches(self, dataloader: Any, epoch: int) -> Iterator[Any]:
        """The batches of one epoch, 0 being the first."""
        if set_epoch := getattr(getattr(dataloader, "sampler", None), "set_epoch", None):
            set_epoch(epoch)
        return iter(dataloader)

    def generators(self, dataloader: Any) -> list[Generator]:
        """Random generators that a loader draws from, beside torch's own."""
        found = [getattr(x, "generator", None) for x in (dataloader, getattr(dataloader, "sampler", None))]
        return list({id(x): x for x in found if isinstance(x, Generator)}.values())

    def __enter__(self) -> Self:
        modules = itertools.chain(self.trained.modules(), *(teacher.modules() for teacher in self.teachers.values()))
        self.flags = [(module, module.training) for module in modules]
        for teacher in self.teachers.values():
            teacher.eval()
        self.trained.train()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, training in self.flags or ():
            module.training = training
        self.flags = None

    def train(
        self,
        optimizer: Optimizer,
        scheduler: Scheduler = None,
        dataloader: Any = None,
        num_epochs: int | None = None,
        callback: Callback | None = None,
        *,
        num_train_epochs: int | None = None,
        num_steps: int | None = None,
        **args: Any,
    ) -> None:
        """Train for `num_epochs` (also called num_train_epochs), or for `num_steps` optimizer steps as one epoch.

        scheduler: stepped after every optimizer step; or a function of the optimizer that makes one. callback(model=,
        step=) after every save. args: further keyword arguments of every model call. Raises ConfigError.
        """
        names = list(inspect.signature(Loop.train).parameters)[1:-1]
        for name in args:
            if near := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
                raise TypeError(f"train(): {name!r} would be passed to the models; did you mean {near[0]!r}?")
        if num_epochs is not None and num_train_epochs is not None:
            raise TypeError("train(): num_epochs and num_train_epochs are the same; give one")
        epochs = num_train_epochs if num_epochs is None else num_epochs
        with self if self.flags is None else nullcontext():
            self.run(optimizer, scheduler, dataloader, epochs, callback, num_steps, args)

    def run(
        self,
        optimizer: Optimizer,
        scheduler: Scheduler,
        dataloader: Any,
        epochs: int | None,
        callback: Callback | None,
        num_steps: int | None,
        args: Mapping[str, Any],
    ) -> None:
        """`train`, inside the context."""
        cfg, group_size = self.train_config, self.train_config.gradient_accumulation_steps
        if dataloader is None:
            raise ConfigError("dataloader: none given; pass an iterable of batches")
        wanted = epochs if num_steps is None else num_steps
        if (epochs is None) == (num_steps is None) or not isinstance(wanted, int) or wanted < 1:
            raise ConfigError(f"num_epochs: {epochs}, num_steps: {num_steps}: give one of them, a whole number from 1")
        count = self.count(dataloader)
        if num_steps is None and count is None:
            raise ConfigError("dataloader: its length is not known, so num_epochs means nothing; give num_steps")
        if count == 0:
            raise ConfigError("dataloader: no batches; is the batch size above the data, with drop_last?")
        if num_steps:
            steps, points, epochs = num_steps, parts(num_steps, cfg.ckpt_frequency), 1
        else:
            shape = cfg.ckpt_frequency, cfg.ckpt_epoch_frequency, epochs or 0
            steps, points = steps_per_epoch(count or 0, group_size), save_points(count or 0, group_size, *shape)
        self.check_devices()
        world = World(dist.get_rank(), dist.get_world_size(), self.device) if dist.is_initialized() else None
        main = world is None or world.main
        scheduler = self.attach(optimizer, scheduler, world)
        scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.amp == "float16")
        parts_of_state = {
            "student": unwrapped(self.trained), "projections": nn.ModuleList(m for m, _ in self.extra),
            "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
        }  # fmt: skip
        generators, folder = self.generators(dataloader), Path(cfg.output_dir)
        done, kept = 0, None
        if cfg.resume:
            kept = self.restore(folder / RESUME, steps, world.size if world else 1, parts_of_state)
        if kept:
            done = kept["step"]
        progress = Progress("training", steps * (epochs or 1), done, main)
        step_log = StepLog(Path(cfg.log_dir) if cfg.log_dir and main else None, done)
        self.report, told, save_at = "", set[str](), set(points)
        rank = world.rank if world else 0
        try:
            for epoch in range(done // steps, epochs or 1):
                within = done - epoch * steps if epoch == done // steps else 0
                if kept:
                    set_random_state(kept["epoch_random" if within else "random"][rank], generators)
                epoch_random = random_state(generators)
                groups = self.groups(dataloader, epoch, steps, group_size, endless=num_steps is not None)
                for _ in range(within):
                    next(groups)
                if kept and within:
                    set_random_state(kept["random"][rank], generators)
                kept = None
                for number, group in enumerate(groups, epoch * steps + within + 1):
                    values = self.step(group, args, optimizer, scheduler, scaler, world)
                    if new := [term for term in values if term.name not in told]:
                        self.tell(new, steps * (epochs or 1), points, main)
                        told |= {term.name for term in new}
                    step_log.step(number, {t.name: t.value for t in values} | {"total": total(values)}, rate(optimizer))
                    progress.step()
                    if number in save_at:
                        step_log.flush()
                        self.save(folder, number, parts_of_state, generators, epoch_random, steps, world)
                        if callback is not None:
                            self.call_back(callback, number)
        finally:
            progress.close()
            step_log.close()

    def groups(self, dataloader: Any, epoch: int, steps: int, size: int, endless: bool) -> Iterator[list[Any]]:
        """The batches of every optimizer step of an epoch, `size` of them or what is left. Raises ConfigError."""
        source = self.again(dataloader) if endless else self.batches(dataloader, epoch)
        for step in range(steps):
            group = list(itertools.islice(source, size))
            if not group:
                raise ConfigError(
                    f"dataloader: ended in step {step + 1} of {steps}: give as many batches as its length says, or "
                    "fewer num_steps"
                )
            # Before the last step, whose save keeps the random state: the end of a sampler may draw once more.
            if step == steps - 1 and not endless and next(source, None) is not None:
                raise ConfigError(f"dataloader: has more batches than its length says, enough for {steps} steps")
            yield group

    def again(self, dataloader: Any) -> Iterator[Any]:
        """Batches from as many passes as are wanted; ends with a loader that has no more."""
        for number in itertools.count():
            empty = True
            for batch in self.batches(dataloader, number):
                empty = False
                yield batch
            if empty:
                return

    def step(
        self, group: Sequence[Any], args: Mapping[str, Any], optimizer: Optimizer, scheduler: Any, scaler: Any,
        world: World | None,
    ) -> list[Term]:  # fmt: skip
        """One optimizer step on a group of batches; its terms, averaged over them."""
        optimizer.zero_grad()
        averaged: dict[str, Term] = {}
        for number, batch in enumerate(group, 1):
            model, last = self.trained, number == len(group)
            with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
                terms = self.terms(batch, args)
                if not terms:
                    raise ConfigError(
                        "nothing to train on: adaptors give no 'logits' and no 'losses' that have a weight, and "
                        "intermediate_matches is empty"
                    )
                scaler.scale(total(terms) / len(group)).backward()
            for term in terms:
                value = term.value.detach() / len(group)
                value = value + averaged[term.name].value if term.name in averaged else value
                averaged[term.name] = Term(term.name, term.weight, value, term.student, term.teacher)
        if world and world.size > 1:  # DDP averages the student's gradients only
            for parameter in self.extra_parameters():
                if parameter.grad is not None:
                    world.sum(parameter.grad).div_(world.size)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None and scaler.get_scale() >= scale:  # else the step was skipped
            if isinstance(scheduler, ReduceLROnPlateau):
                loss = total(list(averaged.values()))
                scheduler.step(float(world.sum(loss) / world.size if world else loss))
            else:
                scheduler.step()
        return list(averaged.values())

    def extra_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of projections."""
        return itertools.chain.from_iterable(module.parameters() for module, _ in self.extra)

    def attach(self, optimizer: Optimizer, scheduler: Scheduler, world: World | None) -> Any:
        """Projections to the device and, once, to the optimizer; the scheduler, made if it is a function."""
        made = scheduler if callable(scheduler) and not hasattr(scheduler, "step") else None
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in known for p in self.trained.parameters()):
            raise ConfigError("optimizer: has no parameter of the trained model; make it from model_S.parameters()")
        for module, options in self.extra:
            module.to(self.device)
            for parameter in module.parameters():
                if world and world.size > 1:
                    dist.broadcast(parameter.data, 0)
            if not any(id(p) in known for p in module.parameters()):
                attach_group(optimizer, None if made else scheduler, module.parameters(), options)
        return made(optimizer) if made else scheduler

    def check_devices(self) -> None:
        """Raise ConfigError where a model is elsewhere than the batches will be."""
        for name, model in {"the trained model": self.trained, **self.teachers}.items():
            place = next((p.device for p in model.parameters()), self.device)
            if place.type != self.device.type or (self.device.index is not None and place != self.device):
                raise ConfigError(f"device: {self.device}, but {name} is on {place}: move it with model.to(device)")

    def tell(self, terms: Sequence[Term], steps: int, points: Sequence[int], shown: bool) -> None:
        """Report terms that are new: all of them at the start of a training, those of another task when it comes."""
        models = {"trained": self.trained, **self.teachers} | (
            {"projections": nn.ModuleList(module for module, _ in self.extra)} if self.extra else {}
        )
        text = term_table(terms) if self.report else start_report(terms, models, steps, points, self.notes)
        self.report += ("\n" if self.report else "") + text
        if shown:
            log.info(text)

    def save(
        self, folder: Path, step: int, parts_of_state: Mapping[str, Any], generators: Sequence[Generator],
        epoch_random: dict[str, Any], steps: int, world: World | None,
    ) -> None:  # fmt: skip
        """Write gs{step}.pkl, the student alone, and resume.pt."""
        random = (random_state(generators), epoch_random)
        all_random = world.gather_values(random) if world else [random]
        if world and not world.main:
            return
        state = {name: part.state_dict() for name, part in parts_of_state.items() if part is not None}
        save_pth(folder / f"gs{step}.pkl", state["student"])
        here, there = ([pair[i] for pair in all_random] for i in (0, 1))
        state |= {"kinds": kinds(parts_of_state), "step": step, "steps": steps}
        keep_state(folder / RESUME, state | {"random": here, "epoch_random": there})

    def restore(self, path: Path, steps: int, ranks: int, parts_of_state: Mapping[str, Any]) -> Any:
        """Load resume.pt, None where there is none. Raises ConfigError where it is of another plan."""
        kept = last_state(path)
        if kept is None:
            return None
        if kept["steps"] != steps:
            raise ConfigError(
                f"{path}: epochs of {kept['steps']} steps, here {steps}: keep data, batch size and accumulation, or "
                "set resume=False"
            )
        if len(kept["random"]) != ranks:
            raise ConfigError(
                f"{path}: of {len(kept['random'])} ranks, here {ranks}: start as many, or set resume=False"
            )
        for name, kind in kinds(parts_of_state).items():
            if kind != (was := kept["kinds"][name]):
                raise ConfigError(f"{path}: {name} was {was}, here {kind}: keep it, or set resume=False")
        for name, part in parts_of_state.items():
            try:
                if part is not None:
                    part.load_state_dict(kept[name])
            except (RuntimeError, ValueError) as error:  # of other shapes, or of other matches' projections
                said = " ".join(str(error).split())
                raise ConfigError(f"{path}: {name} does not fit ({said}): keep it, or set resume=False") from error
        log.info(f"{path}: goes on after step {kept['step']}")
        return kept

    def call_back(self, callback: Callback, step: int) -> None:
        """callback(model=, step=), which disturbs neither the random numbers nor the mode of training."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            callback(model=self.trained, step=step)
        for teacher in self.teachers.values():
            teacher.eval()
        self.trained.train()

    def outputs(self, model: nn.Module, batch: Any, args: Mapping[str, Any], learns: bool) -> Any:
        """A model's outputs for a batch on the device, with gradients if it learns."""
        kind = torch.float16 if self.train_config.amp == "float16" else torch.bfloat16
        with (
            torch.set_grad_enabled(learns),
            torch.autocast(self.device.type, kind, enabled=bool(self.train_config.amp)),
        ):
            return call(model, batch, args)

    def results(
        self, model: nn.Module, adaptor: Adaptor, who: str, batch: Any, args: Mapping[str, Any],
        wanted: Iterable[Place] = (), learns: bool = False,
    ) -> Results:  # fmt: skip
        """What an adaptor makes of a model's outputs for its part of a batch."""
        own = move(for_whom(batch, "student" if learns else "teacher"), self.device)
        found = self.outputs(model, own, args, learns)
        with torch.set_grad_enabled(learns):
            return read(adaptor(own, found), who, wanted)


def kinds(parts_of_state: Mapping[str, Any]) -> dict[str, str]:
    """What optimizer and scheduler are: their states say it only by what they lack."""
    return {name: type(parts_of_state[name]).__name__ for name in ("optimizer", "scheduler")}


def rate(optimizer: Optimizer) -> float:
    """Learning rate of the first group."""
    return float(optimizer.param_groups[0]["lr"])
