"""Projections of the student's features, and a place for them in an optimizer that has a schedule already."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from config import ConfigError
from config.schema import nearest
from utils.streams import stream_seed

PER_GROUP = ("base_lrs", "max_lrs", "_last_lr", "lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")


def linear(dim_S: int, dim_T: int) -> nn.Module:
    """[..., dim_S] -> [..., dim_T]: weights from N(0, 0.02), bias 0."""
    layer = nn.Linear(dim_S, dim_T)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


PROJ_MAP: dict[str, Callable[[int, int], nn.Module]] = {"linear": linear}


def build_projection(name: str, dim_S: int, dim_T: int, number: int) -> nn.Module:
    """The `number`-th projection of a distiller, drawn from a stream of torch's seed without disturbing torch's own."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(torch.initial_seed(), "projection", number))
        return PROJ_MAP[name](dim_S, dim_T)


def attach_group(
    optimizer: Optimizer, scheduler: Any, params: Iterable[nn.Parameter], options: Mapping[str, Any] | None
) -> None:
    """Add a group of parameters under `options` or the optimizer's defaults, on the schedule of its first group.

    Where the schedule sets the rates (CyclicLR, OneCycleLR), the group's are the first one's times lr / default lr.
    Raises ConfigError for an option that the optimizer does not have.
    """
    options, first = options or {}, optimizer.param_groups[0]
    known = optimizer.defaults
    for key in options:
        if key not in known:
            raise ConfigError(f"proj: {key!r} is no option of {type(optimizer).__name__}{nearest(key, known)}")
    optimizer.add_param_group({"params": list(params), **options})
    if scheduler is None:
        return
    group = optimizer.param_groups[-1]
    kinds = list(family(scheduler))
    default = optimizer.defaults["lr"]
    ratio = group["lr"] / default if default else 1.0
    if any(isinstance(kind, CyclicLR | OneCycleLR) for kind in kinds):
        if options.get("lr") is None:
            ratio = 1.0
        group["lr"] = first["lr"] * ratio
        for key in ("betas", "momentum"):
            if key in first:
                group[key] = first[key]
    else:
        start = first.get("initial_lr", first["lr"])
        ratio = group["lr"] / start if start else 1.0
        group["lr"] = first["lr"] * ratio
    for key in first.keys() - group.keys():
        group[key] = first[key] * ratio if key in RATES else first[key]
    for kind in kinds:
        for name in PER_GROUP:
            values = getattr(kind, name, None)
            if isinstance(values, list) and len(values) == len(optimizer.param_groups) - 1:
                rate = name in ("base_lrs", "max_lrs", "_last_lr")
                values.append(values[0] * ratio if rate else values[0])


def family(scheduler: Any) -> Iterable[Any]:
    """A scheduler and those that it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from family(inner)
