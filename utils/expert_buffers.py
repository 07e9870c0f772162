"""Trajectories of experts on disk: one safetensors file each, with one tensor [epochs, P], read a snapshot at a time.

A snapshot is the network's parameters as one vector, before training (epoch 0) or after an epoch.
"""

import json
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from config import ConfigError, Section
from utils.checkpoint import load_pth
from utils.foreign_files import reading
from utils.normaliser import same_zca

Parameters = tuple[tuple[str, tuple[int, ...]], ...]


class ExpertNotes(Section):
    """What a file of snapshots says of itself; all experts of a folder say the same."""

    dataset: str
    zca: str  # hash of the transform that whitened the images; "" = none
    parameters: Parameters  # names and shapes, in the order of the vector
    first: int = Field(0, ge=0)  # epochs kept, first to last
    last: int = Field(ge=0)
    settings: dict[str, Any]

    @property
    def size(self) -> int:
        """P, the numbers of a snapshot."""
        return sum(torch.Size(shape).numel() for _, shape in self.parameters)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the snapshots: [epochs kept, P]."""
        return self.last - self.first + 1, self.size


def parameters_of(net: nn.Module) -> Parameters:
    """Names and shapes of a network's parameters, in the order of a snapshot."""
    return tuple((name, tuple(p.shape)) for name, p in net.named_parameters())


def difference(found: Sequence[object], own: Sequence[object]) -> str:
    """The first of the parameters in which another network differs from this one, in words; "" where none does."""
    pairs = [pair for pair in zip_longest(found, own, fillvalue="nothing") if pair[0] != pair[1]]
    return f"{pairs[0][0]} where this one has {pairs[0][1]}" if pairs else ""


def expert_file(folder: Path, expert: int) -> Path:
    """Where an expert is kept."""
    return folder / f"expert_{expert}.safetensors"


class ExpertWriter:
    """Writes an expert row by row under another name, which becomes the file's when all are there."""

    def __init__(self, path: Path, notes: ExpertNotes) -> None:
        """Keeps what a writer of the same notes left behind. Raises ConfigError where it cannot write."""
        self.path, self.notes, self.partial = path, notes, path.with_suffix(".partial")
        rows, size = notes.shape
        tensor = {"dtype": "F32", "shape": [rows, size], "data_offsets": [0, 4 * rows * size]}
        head = json.dumps({"__metadata__": {"expert": notes.model_dump_json()}, "snapshots": tensor}).encode()
        head += b" " * (-len(head) % 8)
        self.start = 8 + len(head)
        self.write(0, len(head).to_bytes(8, "little") + head)

    def write(self, place: int, data: bytes) -> None:
        """Bytes at a place, on the disk before it returns. Raises ConfigError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.partial, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
                file.seek(place)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{self.partial}: cannot be written ({error.strerror}): free space or choose another buffer_path, then "
                "run the same command again"
            ) from error

    def put(self, epoch: int, snapshot: Tensor) -> None:
        """Write a snapshot [P]; an epoch that is not kept is passed over."""
        if self.notes.first <= epoch <= self.notes.last:
            row = self.start + 4 * self.notes.size * (epoch - self.notes.first)
            self.write(row, snapshot.detach().cpu().float().numpy().tobytes())

    def reaches(self, epoch: int) -> bool:
        """Whether the file is so long that it has the snapshots up to `epoch`."""
        rows = min(epoch, self.notes.last) - self.notes.first + 1
        return self.partial.stat().st_size >= self.start + 4 * self.notes.size * rows

    def finish(self) -> None:
        """Give the file its name."""
        self.partial.replace(self.path)


def read_notes(path: Path) -> ExpertNotes:
    """What an expert says of itself. Raises ConfigError for a damaged or foreign file."""
    with reading(path, "a file of snapshots", SafetensorError), safe_open(path, "pt") as file:
        notes = ExpertNotes.model_validate_json(file.metadata()["expert"])
        found = file.get_slice("snapshots")
        if (tuple(found.get_shape()), found.get_dtype()) != (notes.shape, "F32"):
            raise ValueError(f"snapshots {found.get_dtype()} {found.get_shape()} for {list(notes.shape)}")
    return notes


class ExpertBuffer:
    """The experts of a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where there is none, or where they are of several kinds."""
        self.folder = folder
        self.files = sorted(folder.glob("expert_*.safetensors"), key=lambda path: (len(path.name), path.name))
        if not self.files:
            raise ConfigError(f"{folder}: holds no expert_*.safetensors: make them with distill_feat/buffer.py")
        self.notes = read_notes(self.files[0])
        for path in self.files[1:]:
            if read_notes(path) != self.notes:
                raise ConfigError(f"{path}: made otherwise than {self.files[0].name}: keep one kind in a folder")

    def __len__(self) -> int:
        return len(self.files)

    def check_epoch(self, epoch: int) -> None:
        """Raises ConfigError for an epoch that is not kept."""
        first, last = self.notes.first, self.notes.last
        if not first <= epoch <= last:
            raise ConfigError(
                f"{self.folder}: keeps epochs {first} to {last}, not {epoch}: lower max_start_epoch or expert_epochs, "
                "or make experts that keep it"
            )

    def draw(self, expert: int, epoch: int) -> Tensor:
        """The snapshot [P] after `epoch` epochs, a copy; no other is read. Raises ConfigError if it is not kept."""
        self.check_epoch(epoch)
        path = self.files[expert]
        with reading(path, "a file of snapshots", SafetensorError), safe_open(path, "pt") as file:
            snapshot: Tensor = file.get_slice("snapshots")[epoch - self.notes.first]
        return snapshot.clone()  # the other is a view of the mapped file

    def check(self, dataset: str, net: nn.Module, zca: str) -> None:
        """Raises ConfigError unless the experts are of this data set and network (names, shapes, their order), and saw
        images whitened by the transform of that hash ("" = by none)."""
        if self.notes.dataset != dataset:
            raise ConfigError(f"{self.folder}: experts of {self.notes.dataset}, but dataset.dataset is {dataset}")
        same_zca(self.notes.zca, zca, self.folder)
        if wrong := difference(self.notes.parameters, parameters_of(net)):
            raise ConfigError(f"{self.folder}: experts of another network, with {wrong}: check --model and the network")


def find_experts(path: Path, dataset: str, net: nn.Module, zca: str) -> ExpertBuffer:
    """The one folder, `path` or below it, whose experts pass `check`. Raises ConfigError for none or several."""
    folders = sorted({file.parent for file in path.rglob("expert_*.safetensors")})
    fitting, reasons = list[ExpertBuffer](), dict[bool, list[str]]()  # by whether they are of the data set
    for found in map(ExpertBuffer, folders or [path]):
        try:
            found.check(dataset, net, zca)
        except ConfigError as error:
            reasons.setdefault(found.notes.dataset == dataset, []).append(str(error))
        else:
            fitting.append(found)
    if not fitting:
        raise ConfigError("\n".join(reasons.get(True) or reasons[False]))
    if len(fitting) > 1:
        names = ", ".join(str(found.folder.relative_to(path)) for found in fitting)
        raise ConfigError(f"{path}: {len(fitting)} folders of fitting experts, {names}: name one of them")
    return fitting[0]


def convert_replay(source: Path, folder: Path, notes: ExpertNotes) -> int:
    """Write a public replay_buffer_*.pt, or all of a folder, as files of ours with the notes, epochs as found; returns
    the number of experts. Nothing in a list is executed. Raises ConfigError for anything but lists of parameters."""
    names = source.glob("replay_buffer_*.pt") if source.is_dir() else [source]
    count = 0
    for path in sorted(names, key=lambda path: (len(path.name), path.name)):
        for snapshots in replayed(path, notes.parameters):
            found = notes.model_copy(update={"first": 0, "last": len(snapshots) - 1})
            writer = ExpertWriter(expert_file(folder, count), found)
            for epoch, snapshot in enumerate(snapshots):
                writer.put(epoch, torch.cat([p.flatten() for p in snapshot]))
            writer.finish()
            count += 1
    if not count:
        raise ConfigError(f"{source}: holds no replay_buffer_*.pt")
    return count


def replayed(path: Path, parameters: Parameters) -> list[list[list[Tensor]]]:
    """Experts of a public file, each a list of snapshots, each a list of fitting tensors. Raises ConfigError."""
    experts: list[list[list[Tensor]]] = load_pth(path)
    with reading(path, "a list of experts, each a list of snapshots, each a list of tensors"):
        states = [[tuple(p.shape) for p in state] for snapshots in experts for state in snapshots]
        alike = any(all(map(torch.equal, snapshots[0], snapshots[-1])) for snapshots in experts)
    wrong = [text for state in states if (text := difference(state, [shape for _, shape in parameters]))]
    if wrong:
        raise ConfigError(f"{path}: experts of another network, with {wrong[0]}: check --model and --dataset")
    if alike:
        raise ConfigError(f"{path}: an expert never moves, as the public writer leaves it on a CPU: make it anew")
    return experts
