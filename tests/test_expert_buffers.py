"""Experts on disk: what safetensors reads is what was put, one snapshot at a time; public lists read safely."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from config import ConfigError
from utils.expert_buffers import (
    ExpertBuffer,
    ExpertNotes,
    ExpertWriter,
    convert_replay,
    expert_file,
    find_experts,
    parameters_of,
    read_notes,
)

ZCA = "a" * 64


def network(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def notes(first: int = 0, last: int = 4, **more: Any) -> ExpertNotes:
    values: dict[str, Any] = {
        "dataset": "digits", "zca": ZCA, "parameters": parameters_of(network()), "first": first, "last": last,
        "settings": {"lr": 0.01},
    }  # fmt: skip
    return ExpertNotes(**values | more)


def states(last: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(last + 1, 23, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, expert: int = 0, found: ExpertNotes | None = None) -> Tensor:
    found = found or notes()
    writer, rows = ExpertWriter(expert_file(folder, expert), found), states(found.last, expert)
    for epoch, row in enumerate(rows):
        writer.put(epoch, row)
    writer.finish()
    return rows


def test_safetensors_reads_what_was_put(tmp_path: Path) -> None:
    rows = write(tmp_path)
    (found,) = load_file(tmp_path / "expert_0.safetensors").values()
    assert torch.equal(found, rows) and found.dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["expert_0.safetensors"]
    assert read_notes(tmp_path / "expert_0.safetensors") == notes()


def test_snapshot_is_a_copy_both_ways(tmp_path: Path) -> None:
    writer, weights = ExpertWriter(expert_file(tmp_path, 0), notes(last=1)), torch.ones(23)
    for epoch in range(2):
        writer.put(epoch, weights)
        weights.zero_()  # as training moves on in place
    writer.finish()
    buffer = ExpertBuffer(tmp_path)
    drawn = buffer.draw(0, 0)
    assert drawn.sum() == 23 and buffer.draw(0, 1).sum() == 0
    drawn += 5
    assert buffer.draw(0, 0).sum() == 23 and drawn.untyped_storage().nbytes() == 4 * 23


def test_every_expert_and_epoch_is_drawn_as_it_was(tmp_path: Path) -> None:
    rows = [write(tmp_path, expert) for expert in range(11)]  # expert_10 comes after expert_9
    buffer = ExpertBuffer(tmp_path)
    assert len(buffer) == 11
    assert all(torch.equal(buffer.draw(e, t), rows[e][t]) for e in range(11) for t in range(5))


def test_a_draw_reads_its_snapshot_and_not_the_file(tmp_path: Path) -> None:
    size = 2**20
    large = notes(last=1023, parameters=(("w", (size,)),))  # 4 GB, most of it a hole
    writer, row = ExpertWriter(expert_file(tmp_path, 0), large), torch.randn(size)
    writer.put(700, row)
    writer.put(1023, row)
    writer.finish()
    assert (tmp_path / "expert_0.safetensors").stat().st_size > 4 * size * 1024
    buffer, before = ExpertBuffer(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    drawn = buffer.draw(0, 700)
    assert time.monotonic() - began < 0.1
    assert torch.equal(drawn, row)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_only_the_asked_epochs_take_bytes(tmp_path: Path) -> None:
    rows = write(tmp_path, 0, notes(1, 3))
    path = tmp_path / "expert_0.safetensors"
    head = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + head + 3 * 23 * 4
    buffer = ExpertBuffer(tmp_path)
    assert all(torch.equal(buffer.draw(0, epoch), rows[epoch]) for epoch in (1, 2, 3))
    for epoch in (0, 4, -1):
        with pytest.raises(ConfigError, match=f"keeps epochs 1 to 3, not {epoch}: lower max_start_epoch"):
            buffer.draw(0, epoch)


def test_an_unfinished_expert_is_none_and_goes_on(tmp_path: Path) -> None:
    rows = states()
    first = ExpertWriter(expert_file(tmp_path, 0), notes())
    for epoch in range(3):
        first.put(epoch, rows[epoch])
    with pytest.raises(ConfigError, match="holds no expert_"):
        ExpertBuffer(tmp_path)
    second = ExpertWriter(expert_file(tmp_path, 0), notes())
    assert second.reaches(2) and not second.reaches(3)
    for epoch in range(3, 5):
        second.put(epoch, rows[epoch])
    second.finish()
    assert torch.equal(load_file(tmp_path / "expert_0.safetensors")["snapshots"], rows)


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written .*: free space or choose another buffer_path"):
        ExpertWriter(expert_file(tmp_path / "file", 0), notes())


@pytest.mark.parametrize(
    ("dataset", "net", "zca", "text"),
    [
        ("cifar10", network(), ZCA, "experts of digits, but dataset.dataset is cifar10"),
        ("digits", network(), "", "made with ZCA aaaaaaaa, but this run has no ZCA"),
        ("digits", network(5), ZCA, r"\('0.weight', \(3, 4\)\) where this one has \('0.weight', \(5, 4\)\)"),
        ("digits", nn.Sequential(*network().children(), nn.Linear(2, 2)), ZCA, "nothing where this one has"),
        ("digits", nn.Linear(4, 3), ZCA, r"'0.weight', .* where this one has \('weight'"),
    ],
)
def test_foreign_experts_are_refused(tmp_path: Path, dataset: str, net: nn.Module, zca: str, text: str) -> None:
    write(tmp_path / "some" / "folder")
    find_experts(tmp_path, "digits", network(), ZCA).check("digits", network(), ZCA)
    with pytest.raises(ConfigError, match=text):
        find_experts(tmp_path, dataset, net, zca)


def test_the_one_fitting_folder_is_found(tmp_path: Path) -> None:
    for name, zca in (("a/plain", ""), ("b/white", ZCA)):
        write(tmp_path / name, 0, notes(zca=zca))
    write(tmp_path / "others", 0, notes(dataset="cifar10"))
    assert find_experts(tmp_path, "digits", network(), ZCA).folder == tmp_path / "b" / "white"
    with pytest.raises(ConfigError) as error:
        find_experts(tmp_path, "digits", network(), "c")
    assert len(str(error.value).splitlines()) == 2  # of those of other data nothing is said
    write(tmp_path / "c", 0, notes(last=2))
    with pytest.raises(ConfigError, match="2 folders of fitting experts, b/white, c: name one"):
        find_experts(tmp_path, "digits", network(), ZCA)
    assert find_experts(tmp_path / "c", "digits", network(), ZCA).notes.last == 2
    with pytest.raises(ConfigError, match="make them with distill_feat/buffer.py"):
        find_experts(tmp_path / "nowhere", "digits", network(), ZCA)


def test_experts_of_two_kinds_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1, notes(settings={"lr": 0.1}))
    with pytest.raises(ConfigError, match="expert_1.safetensors: made otherwise than expert_0"):
        ExpertBuffer(tmp_path)


def cut(data: bytes) -> bytes:
    return data[:-4]


def renamed(data: bytes) -> bytes:
    return data.replace(b'\\"digits\\"', b"[1,2,3,4,5]"[:10])


@pytest.mark.parametrize("damage", [cut, renamed, lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_expert_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write(tmp_path)
    path = tmp_path / "expert_0.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=f"{path}: not a file of snapshots"):
        ExpertBuffer(tmp_path)


def as_lists(rows: Tensor, net: nn.Module) -> list[list[Tensor]]:
    shapes = [p.shape for p in net.parameters()]
    return [[t.view(s) for t, s in zip(row.split([s.numel() for s in shapes]), shapes, strict=True)] for row in rows]


def test_public_lists_are_taken_over(tmp_path: Path) -> None:
    rows = [states(3, seed) for seed in range(12)]
    for number in range(12):  # a file each: replay_buffer_10 comes after replay_buffer_9
        torch.save([as_lists(rows[number], network())], tmp_path / f"replay_buffer_{number}.pt")
    assert convert_replay(tmp_path, tmp_path / "ours", notes()) == 12
    buffer = find_experts(tmp_path / "ours", "digits", network(), ZCA)
    assert (len(buffer), buffer.notes.first, buffer.notes.last) == (12, 0, 3)
    assert all(torch.equal(buffer.draw(e, t), rows[e][t]) for e in range(12) for t in range(4))
    torch.save([as_lists(row, network()) for row in rows[:2]], tmp_path / "one.pt")
    assert convert_replay(tmp_path / "one.pt", tmp_path / "one", notes()) == 2


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


GOOD = as_lists(states(1), network())
WRONG: dict[str, tuple[Any, str]] = {
    "code": ([[[Evil()]]], "not a readable file of tensors"),
    "numbers": ([1, 2], "not a list of experts"),
    "dict": ({"a": GOOD}, "not a list of experts"),
    "empty expert": ([[]], "not a list of experts"),
    "no experts": ([], "holds no replay_buffer"),
    "shapes": ([as_lists(torch.rand(2, 37), network(5))], r"\(5, 4\) where this one has \(3, 4\): check --model"),
    "fewer": ([[state[:3] for state in GOOD]], r"nothing where this one has \(2,\)"),
    "aliases": ([[GOOD[0], GOOD[0]]], "an expert never moves"),
}


@pytest.mark.parametrize("name", WRONG)
def test_public_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    value, text = WRONG[name]
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(value, path)
    with pytest.raises(ConfigError, match=text):
        convert_replay(path, tmp_path / "ours", notes())
    assert not list(tmp_path.rglob("expert_*.safetensors"))


def test_metadata_is_json_for_other_programs(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / "expert_0.safetensors").read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(head["__metadata__"]["expert"])["parameters"][0] == ["0.weight", [3, 4]]
