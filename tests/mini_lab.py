"""A data set so small that whole runs of the text programs take seconds."""

import json
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from launching import ROOT, start, torchrun, wait

CLASSES = ("corn", "money", "oil", "ship", "rare")
NITER = 40
STUDENT = {"optimizer": "adamw", "lr": 1e-3, "head_lr": 3e-3, "batch_size": 16}
CONFIG: dict[str, dict[str, object]] = {
    "dataset": {"dataset": "mini", "nclass": 5, "batch_real": 8, "is_multilabel": True},
    "network": {"model_path": "scratch:tiny", "depth": 2, "max_length": 16, "pooling": "mean", "vocab_size": 300},
    "pretrain": STUDENT | {"epochs": 2},
    "optimization": {"optimizer": "adam", "lr_img": 0.05, "lr_scale_adam": 1.0},
    "condense": {
        "ipc": 2, "num_premodel": 2, "teacher_model_epoch": 2, "niter": NITER, "num_freqs": 32, "match_weight": 3,
        "token_budget": 64, "save_every": 20, "checkpoint_every": 3, "val_every": 0,
    },
    "evaluation": STUDENT | {"steps": 5, "repeat": 2, "rows": ["condensed", "random", "full", "initial"]},
}  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """A small data set, its configuration and teachers."""

    folder: Path

    @property
    def yaml(self) -> Path:
        return self.folder / "mini.yaml"

    def words(self, name: str, save: str = "base", *more: str) -> list[str | Path]:
        """Program, configuration and overrides; `save` names the results folder."""
        return [ROOT / "condense" / f"{name}.py", f"--config_path={self.yaml}", f"save_dir={self.folder / save}", *more]

    def start(self, name: str, save: str = "base", *more: str, ranks: int = 1) -> subprocess.Popen[str]:
        return start([*torchrun(ranks), *self.words(name, save, *more)])

    def condense(self, save: str, *more: str, ranks: int = 1) -> subprocess.Popen[str]:
        return self.start("condense_script_text", save, *more, ranks=ranks)

    def run_folder(self, save: str) -> Path:
        """The one condensation run in a results folder."""
        (folder,) = (self.folder / save / "condense" / "condense" / "mini" / "ipc2").iterdir()
        return folder

    def rows(self, save: str, iteration: int = NITER) -> torch.Tensor:
        path = self.run_folder(save) / "distilled_data" / f"syn_data_{iteration}.pth"
        return torch.load(path, weights_only=True)["data"]

    def wait_for_state(self, save: str, process: subprocess.Popen[str]) -> None:
        """Return as soon as the run has saved a state."""
        until = time.monotonic() + 120
        while not list((self.folder / save).glob("condense/condense/mini/ipc2/*/state.pth")):
            assert process.poll() is None and time.monotonic() < until, wait(process, None)
            time.sleep(0.002)


def document(labels: Sequence[int], draw: random.Random) -> dict[str, object]:
    words = [f"{CLASSES[label]}{'abcdef'[draw.randrange(6)]}" for label in labels for _ in range(5)]
    words += [f"common{'abcdefgh'[draw.randrange(8)]}" for _ in range(draw.randrange(1, 6))]
    draw.shuffle(words)
    return {"text": " ".join(words), "labels": [CLASSES[label] for label in labels]}


def write_data(folder: Path) -> None:
    """60 documents; every fifth has two labels; the last class has a single one to train on."""
    draw = random.Random(0)
    folder.mkdir()
    for part, count in (("train", 40), ("val", 8), ("test", 12)):
        labels = [[i % 4] + ([(i + 1) % 4] if i % 5 == 0 else []) for i in range(count - 1)] + [[4]]
        lines = [json.dumps(document(own, draw)) for own in labels]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def make_lab(folder: Path) -> Lab:
    """Data, configuration and trained teachers in `folder`."""
    lab = Lab(folder)
    write_data(lab.folder / "data")
    places = {"pretrained_dir": str(lab.folder / "teachers"), "cache_dir": str(lab.folder / "cache")}
    dataset = CONFIG["dataset"] | {"data_dir": str(lab.folder / "data")}
    lab.yaml.write_text(yaml.safe_dump(CONFIG | places | {"dataset": dataset}))
    done = wait(lab.start("pretrain_script_text"))
    assert "teacher 1: validation micro-F1" in done.err
    return lab
