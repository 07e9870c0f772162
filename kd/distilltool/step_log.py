"""The values of every optimizer step, as JSON lines and, where it is installed, for TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import ConfigError
from utils.run_folder import tensorboard_writer

FLUSH = 50  # steps that are written at once: each write waits for the device


class StepLog:
    """Values by step into `folder`/metrics.jsonl and `folder`/tensorboard; no folder, no log."""

    def __init__(self, folder: Path | None, start: int) -> None:
        """A run that goes on after step `start` > 0 writes the later lines again."""
        self.folder, self.kept = folder, list[tuple[int, dict[str, Tensor], float]]()
        self.writer: Any = False
        if folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"log_dir: {folder}: {error.strerror}: name a folder, or None for no log") from error
            self.writer = tensorboard_writer(folder)
            if start and (path := folder / "metrics.jsonl").exists():
                lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start]
                path.write_text("".join(f"{line}\n" for line in lines))

    def step(self, number: int, values: Mapping[str, Tensor], rate: float) -> None:
        """Keep a step's values [] and learning rate."""
        if self.folder:
            self.kept.append((number, dict(values), rate))
            if len(self.kept) >= FLUSH:
                self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        if not self.folder or not self.kept:
            return
        every = [value.double() for _, values, _ in self.kept for value in values.values()]
        found = iter(torch.stack(every).tolist())
        with (self.folder / "metrics.jsonl").open("a") as file:
            for number, values, rate in self.kept:
                line = {name: next(found) for name in values} | {"lr": rate}
                file.write(json.dumps({"step": number} | line) + "\n")
                if self.writer:
                    for name, value in line.items():
                        self.writer.add_scalar(name, value, number)
        self.kept.clear()

    def close(self) -> None:
        """Write what is kept and end."""
        self.flush()
        if self.writer:
            self.writer.close()
