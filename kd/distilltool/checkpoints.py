"""When weights are saved, and what a run needs to go on."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps of an epoch: its last one takes the batches that are left over."""
    return math.ceil(batches / accumulation)


def parts(steps: int, frequency: int) -> list[int]:
    """Steps at which `frequency` equal parts of so many steps end: the last is `steps`."""
    return sorted({steps * i // frequency for i in range(1, frequency + 1)} - {0})


def save_points(batches: int, accumulation: int, frequency: int, epoch_frequency: int, epochs: int) -> list[int]:
    """Optimizer steps with a save after: `frequency` in every `epoch_frequency`-th epoch, and the last one."""
    steps = steps_per_epoch(batches, accumulation)
    ends = range(epoch_frequency, epochs + 1, epoch_frequency)
    points = {steps * (epoch - 1) + part for epoch in ends for part in parts(steps, frequency)}
    return sorted(points | {steps * epochs})


def random_state(generators: Sequence[Generator]) -> dict[str, Any]:
    """State of torch's random numbers on every device and of a loader's own generators."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loaders": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: Sequence[Generator]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, kept in zip(generators, state["loaders"], strict=False):
        generator.set_state(kept)
