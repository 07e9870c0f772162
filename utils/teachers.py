"""The teacher bank: networks at their random start and after training, and every network between the two."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from config import ConfigError
from utils.checkpoint import drop_state, keep_state, last_state, load_tensors, save_tensors
from utils.ddp import World
from utils.fit import FitConfig, fit, make_optimizer, supervised
from utils.progress import Progress
from utils.run_folder import alone_in
from utils.sampling import training_batch
from utils.stopping import StopFlag, Stopped
from utils.streams import generator

log = logging.getLogger("distill_lab")


class PretrainConfig(FitConfig):
    """How teachers are trained."""

    epochs: int = Field(ge=1)  # length of the schedule; training ends at condense.teacher_model_epoch
    seed: int = 0


def trainable(net: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter of what teachers differ in (a frozen word table is shared)."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def member_files(folder: Path, member: int, epoch: int) -> tuple[Path, Path]:
    """Files of a member's state at its start and after `epoch` epochs."""
    return (
        folder / f"premodel{member}_init.safetensors",
        folder / f"premodel{member}_epoch{epoch}.safetensors",
    )


def missing_members(folder: Path, count: int, epoch: int) -> list[int]:
    """Members 0 ... count - 1 whose two files are not both there."""
    return [i for i in range(count) if not all(path.exists() for path in member_files(folder, i, epoch))]


def train_member(
    folder: Path,
    member: int,
    last_epoch: int,
    fresh: Callable[[], nn.Module],
    batch: Callable[[int], tuple[Any, Tensor]],
    per_epoch: int,
    settings: PretrainConfig,
    multilabel: bool,
    device: torch.device,
    flag: StopFlag,
    shown: bool,
) -> None:
    """Train one teacher and write its files; goes on from the last finished epoch. Raises Stopped on a signal."""
    init, final = member_files(folder, member, last_epoch)
    resume = folder / f"premodel{member}_resume.pth"
    net = fresh().to(device)
    if not init.exists():
        save_tensors(init, dict(trainable(net)))
    optimizer, objective = make_optimizer(net, settings), supervised(net, batch, multilabel)
    epoch = 0
    if (state := last_state(resume)) is not None:
        try:
            load_state(net, state["net"], resume)
            optimizer.load_state_dict(state["optimizer"])
            epoch = int(state["epoch"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{resume}: not a state of this teacher ({error}): delete it") from error
        log.info(f"teacher {member}: resumed after epoch {epoch}")
    total = settings.epochs * per_epoch
    progress = Progress(f"teacher {member}", last_epoch * per_epoch, epoch * per_epoch, shown)
    while epoch < last_epoch:
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        stream = (settings.seed, "dropout", member)
        for step, loss in fit(net, objective, optimizer, settings, steps, total, stream):
            progress.step(note=f"loss {loss.item():.3f}" if step % 20 == 0 else "")
            if flag.number:
                raise Stopped(flag.number)
        epoch += 1
        if not loss.isfinite():
            raise ConfigError(f"teacher {member}: the loss is not finite in epoch {epoch}: lower pretrain.lr")
        if epoch < last_epoch:
            keep_state(resume, {"epoch": epoch, "net": dict(trainable(net)), "optimizer": optimizer.state_dict()})
    progress.close()
    save_tensors(final, dict(trainable(net)))
    drop_state(resume)


def load_state(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy a saved state into the trainable parameters. Raises ConfigError for another network's state."""
    own = trainable(net)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise ConfigError(
            f"{path}: holds another network's parameters: delete the folder, or check the network section"
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(state[name])


@dataclass(frozen=True)
class TeacherBank:
    """States of all members in memory, as flat name -> tensor dicts on the device."""

    init: list[dict[str, Tensor]]
    final: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.final)

    def interpolate(self, net: nn.Module, member: int, share: float) -> None:
        """Set the network to share * init + (1 - share) * final of one member, buffers left alone."""
        own = dict(net.named_parameters())  # not `trainable`: networks that only look on are frozen
        with torch.no_grad():
            for name, trained in self.final[member].items():
                own[name].copy_(torch.lerp(trained, self.init[member][name], share))


def load_bank(folder: Path, count: int, epoch: int, like: nn.Module, device: torch.device) -> TeacherBank:
    """Read `count` members from `folder`. Raises ConfigError for a damaged or foreign file."""
    init: list[dict[str, Tensor]] = []
    final: list[dict[str, Tensor]] = []
    for member in range(count):
        for path, states in zip(member_files(folder, member, epoch), (init, final), strict=True):
            state = load_tensors(path, device)
            load_state(like, state, path)
            states.append(state)
    return TeacherBank(init, final)


def update_feature_extractor(
    bank: TeacherBank,
    model_final: nn.Module,
    model_interval: nn.Module,
    gen: Generator,
    a: float = 0,
    b: float = 1,
) -> tuple[int, float]:
    """Draw a member and l ~ U(a, b); model_final gets its trained state, model_interval l of the way to its start.

    Returns (member, l). NCFM (CVPR 2025), section on the feature extractor.
    """
    member = int(torch.randint(len(bank), (1,), generator=gen))
    share = a + (b - a) * float(torch.rand(1, generator=gen))
    bank.interpolate(model_final, member, 0.0)
    bank.interpolate(model_interval, member, share)
    return member, share


def train_bank(
    folder: Path,
    count: int,
    last_epoch: int,
    fresh: Callable[[int], nn.Module],
    data: Any,
    augment: Callable[[Any, Tensor, Generator], tuple[Any, Tensor]] | None,
    settings: PretrainConfig,
    multilabel: bool,
    world: World,
    flag: StopFlag,
) -> None:
    """Train those of `count` members that are missing on `data` (`lengths` [N] and `batch(samples, device)`), each rank
    its share; a process that trains them already is waited for."""
    per_epoch = -(-len(data) // settings.batch_size)

    def train(member: int, shown: bool) -> None:
        def batch(step: int) -> tuple[Any, Tensor]:
            which = training_batch(data.lengths, settings.batch_size, step, settings.seed, member)
            x, targets = data.batch(which, world.device)
            gen = generator(settings.seed, "teacher augmentation", member, step)
            return augment(x, targets, gen) if augment else (x, targets)

        train_member(
            folder, member, last_epoch, lambda: fresh(member), batch, per_epoch, settings, multilabel, world.device,
            flag, shown,
        )  # fmt: skip

    with alone_in(folder, world, flag):
        missing = world.broadcast(missing_members(folder, count, last_epoch))
        for i in world.share([1.0] * len(missing)):
            train(missing[i], world.main)
        world.barrier()
