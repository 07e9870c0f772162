"""The one supervised loop: teachers and students of every program are trained by it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from config import Section
from utils.losses import task_loss
from utils.streams import stream_seed


class FitConfig(Section):
    """Optimiser and schedule of one supervised training."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    head_lr: float | None = Field(None, gt=0)  # of the new head; None = lr
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.06, ge=0, lt=1)  # share of the steps with rising learning rate; cosine to 0 after it
    clip: float = Field(1.0, gt=0)  # largest gradient norm
    batch_size: int = Field(ge=1)


def make_optimizer(net: nn.Module, settings: FitConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters, the head with its own rate."""
    head = {id(p) for p in getattr(net, "head", nn.Module()).parameters()}
    trainable = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in head], "lr": settings.lr},
        {"params": [p for p in trainable if id(p) in head], "lr": settings.head_lr or settings.lr},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at `step` of `steps`: linear rise over the warm-up, then half a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def fit(
    net: nn.Module,
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    settings: FitConfig,
    steps: range,
    total: int,
    stream: tuple[int, str, int],
) -> Iterator[tuple[int, Tensor]]:
    """Train over `steps` out of `total`, yielding (step, loss); `loss(step)` is the scalar that a step goes down.

    Dropout draws from the stream (*stream, step), so that a part of the loop equals that part of the whole.
    """
    base = [group.setdefault("base_lr", group["lr"]) for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    net.train()
    for step in steps:
        torch.manual_seed(stream_seed(*stream, step))
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * rate(step, total, settings.warmup)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        yield step, value.detach()


def supervised(net: nn.Module, batch: Callable[[int], tuple[Any, Tensor]], multilabel: bool) -> Callable[[int], Tensor]:
    """The mean task loss of `net` at a step, `batch(step)` giving (input, targets [B, C])."""

    def loss(step: int) -> Tensor:
        x, targets = batch(step)
        return task_loss(net(x).logits, targets, multilabel).mean()

    return loss


@torch.no_grad()
def predict(net: nn.Module, read: Callable[[Tensor], Any], parts: list[list[int]], count: int) -> Tensor:
    """Logits [N, C] on the CPU of `count` samples, computed in the given parts."""
    net.eval()
    logits: Tensor | None = None
    for part in parts:
        ids = torch.tensor(part)
        rows = net(read(ids)).logits.float().cpu()
        if logits is None:
            logits = rows.new_zeros(count, rows.shape[1])
        logits[ids] = rows
    if logits is None:
        raise ValueError("predict: no samples given")
    return logits
