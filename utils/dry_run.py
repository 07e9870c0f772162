"""What every dry run says: values with their sources, and the classes of each rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Resolved, flatten
from utils.ddp import assign, kept_classes


def print_values(resolved: Resolved[Any], folder: Path) -> None:
    """The run folder, and every value with its source."""
    print(f"run folder: {folder}")
    for key, value in flatten(resolved.config).items():
        print(f"  {key}: {value}  [{resolved.sources.get(key, 'default')}]")


def print_classes(costs: Sequence[float], debug: bool, ranks: int) -> None:
    """The classes of every rank."""
    for rank, part in enumerate(assign(costs[: kept_classes(len(costs), debug)], ranks)):
        print(f"rank {rank}: classes {', '.join(map(str, part)) or 'none (helps with the real side)'}")
