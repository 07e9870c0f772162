"""What goes wrong in long runs: torn checkpoints, full and read-only disks, numbers that are none, ends of every sort.

Nothing saved is lost, and the same command comes to the same bits as if nothing had happened.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, start, wait
from mini_lab import Lab as TextLab
from mini_lab import make_lab
from safetensors.torch import load_file

from condense import condense_script, pretrain_script
from condenser.Condenser_image import Condenser as ImageCondenser
from condenser.gradient_condenser import GradientCondenser
from condenser.matching import Losses
from condenser.synthetic_set import load_synthetic
from condenser.trajectory_condenser import TrajectoryCondenser
from config import ConfigError
from distill_feat import buffer, dc, mtt
from utils import checkpoint
from utils.checkpoint import drop_state, keep_state, last_state, load_pth, previous
from utils.expert_buffers import ExpertBuffer
from utils.run_folder import RunFolder
from utils.stopping import StopFlag
from utils.teachers import PretrainConfig, train_member
from utils.utils_image import ImageSet

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # within pytest's own process
FILES = ROOT / "config"
NITER = 10
SMALL = {
    "dataset": {"dataset": "digits", "nclass": 10, "size": 8, "batch_real": 8},
    "network": {"width": 8, "depth": 2},
}
END = {"evaluation": {"steps": 1, "repeat": 1, "probe_every": 1, "batch_size": 64, "rows": ["distilled"]}}
RHYTHM = {"ipc": 1, "niter": NITER, "checkpoint_every": 2, "save_every": 5, "val_every": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "dc": SMALL | END | {
        "base": str(FILES / "distill_feat" / "dc" / "digits_ipc1.yaml"), "pretrain": {"epochs": 1},
        "condense": RHYTHM | {"outer_loop": 1, "inner_loop": 1},
    },
    "buffer": SMALL | {
        "base": str(FILES / "distill_feat" / "buffer" / "digits.yaml"),
        "experts": {"num_experts": 1, "train_epochs": 4, "batch_train": 256},
    },
    "mtt": SMALL | END | {
        "base": str(FILES / "distill_feat" / "mtt" / "base.yaml"), "pretrain": {"epochs": 1},
        "condense": RHYTHM | {
            "syn_steps": 2, "batch_syn": 6, "expert_epochs": 1, "max_start_epoch": 3, "lr_img": 100,
            "aug_type": "color",
        },
    },
    "image": {
        "base": str(FILES / "ipc10" / "digits.yaml"), "network": {"width": 8}, "pretrain": {"epochs": 1},
        "condense": {
            "ipc": 2, "num_premodel": 1, "teacher_model_epoch": 1, "niter": 24, "num_freqs": 32, "image_budget": 64,
            "save_every": 12, "checkpoint_every": 2, "aug_type": "color_crop_cutout",
        },
    },
    "kd": {
        "base": str(FILES / "kd" / "digits" / "base.yaml"),
        "DATASET": {"SIZE": 16, "PAD": 2, "PER_CLASS": 8, "VAL_FRACTION": 0.25, "TEST": {"BATCH_SIZE": 100}},
        "DISTILLER": {"TYPE": "NONE", "STUDENT": "resnet8_sdd"},
        "SOLVER": {"BATCH_SIZE": 16, "EPOCHS": 20, "LR": 0.05, "LR_DECAY_STAGES": [10]},
    },
}  # fmt: skip
PROGRAMS: dict[str, Callable[[], int]] = {
    "dc": dc.main, "buffer": buffer.main, "mtt": mtt.main, "pretrain": pretrain_script.main,
    "image": condense_script.main,
}  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """Short configurations, with experts in common."""

    folder: Path

    def words(self, program: str, save: str, *more: str) -> list[str]:
        file = "image" if program == "pretrain" else program
        places = [f"--config_path={self.folder / file}.yaml", f"pretrained_dir={self.folder / 'starts'}"]
        places.append(f"save_dir={self.folder / save}")
        if program == "mtt":
            places.append(f"--buffer_path={self.folder / 'experts'}")
        if program == "buffer":
            places = [places[0], f"--buffer_path={self.folder / save}"]
        if program == "kd":
            places = [f"--cfg={self.folder / 'kd.yaml'}", f"LOG.PREFIX={self.folder / save}"]
        return [*places, *more]

    def within(self, program: str, save: str, *more: str) -> int:
        """Exit status of the program within this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{program}.py", *self.words(program, save, *more)])
            return PROGRAMS[program]()

    def path(self, save: str, name: str) -> Path:
        (path,) = (self.folder / save).rglob(name)
        return path

    def reopen(self, base: str, save: str) -> Path:
        """A copy of a finished run that has to do its last iterations again; its state."""
        shutil.copytree(self.folder / base, self.folder / save)
        for path in (self.folder / save).rglob("result.json"):
            path.unlink()
        return self.path(save, "state.pth")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With one undisturbed run of gradient matching in `base`."""
    lab = Lab(tmp_path_factory.mktemp("faults"))
    for name, config in CONFIGS.items():
        (lab.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert lab.within("dc", "base") == 0
    return lab


def same_end(lab: Lab, save: str, base: str = "base") -> bool:
    one, other = (load_synthetic(lab.path(name, f"syn_data_{NITER}.pth")) for name in (save, base))
    lines = [lab.path(name, "metrics.jsonl").read_text() for name in (save, base)]
    return torch.equal(one.data, other.data) and lines[0] == lines[1]


# Two generations of a state.


def states(folder: Path, count: int = 3) -> Path:
    path = folder / "state.pth"
    for i in range(count):
        keep_state(path, {"iteration": i, "w": torch.full((100,), float(i))})
    return path


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = raw.index(torch.full((100,), 2.0).numpy().tobytes()) + 200
    raw[place] ^= 1
    path.write_bytes(raw)


TORN: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("kind", TORN)
def test_a_damaged_state_gives_way_to_the_one_before_it(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = states(tmp_path)
    assert last_state(path)["iteration"] == 2 and load_pth(previous(path))["iteration"] == 1
    TORN[kind](path)
    assert last_state(path)["iteration"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: damaged or lost; the state before it is used, state.previous.pth"
    ]
    keep_state(path, {"iteration": 3})  # the damaged one is not kept in place of a good one
    TORN["truncated"](path)
    assert last_state(path)["iteration"] == 1
    drop_state(path)
    assert not list(tmp_path.iterdir()) and last_state(path) is None


def test_without_a_readable_state_both_are_named(tmp_path: Path) -> None:
    path = states(tmp_path)
    for file in (path, previous(path)):
        os.truncate(file, 50)
    with pytest.raises(ConfigError, match=r"state.pth: not readable, nor is the state before it, state.previous.pth"):
        last_state(path)
    os.truncate(states(tmp_path / "one", 1), 50)
    with pytest.raises(ConfigError, match="not a readable file of tensors"):
        last_state(tmp_path / "one" / "state.pth")


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_disk_that_fails_while_a_state_is_written_keeps_both(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = states(tmp_path)

    def fail(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    if call == "link":  # a file system without links
        keep_state(path, {"iteration": 3})
    else:
        with pytest.raises(ConfigError, match="state.pth: cannot be written .No space left on device"):
            keep_state(path, {"iteration": 3})
    monkeypatch.undo()
    assert last_state(path)["iteration"] == (3 if call == "link" else 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.previous.pth", "state.pth"]
    if call != "replace":
        assert load_pth(previous(path))["iteration"] == (2 if call == "link" else 1)


def test_a_run_with_a_truncated_state_says_so_and_ends_with_the_same_bits(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    state = lab.reopen("base", "torn")
    os.truncate(state, state.stat().st_size // 2)
    half = state.with_name(".state.pth.killed")
    half.touch()
    assert lab.within("dc", "torn") == 0 and not half.exists()
    said = f"{state}: damaged or lost; the state before it is used, state.previous.pth"
    kept = (state.parent / "print.log").read_text()
    assert said in capsys.readouterr().err and said in kept
    assert f"resumed at iteration {NITER - 2} of {NITER}" in kept
    assert same_end(lab, "torn")


def test_an_expert_with_a_truncated_state_or_file_ends_with_the_same_bits(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.within("buffer", "experts") == 0
    real, calls = buffer.keep_state, list[Path]()

    def tear(path: Path, value: dict[str, Any]) -> None:
        real(path, value)
        calls.append(path)
        if len(calls) == 3:
            raise ConfigError("torn")

    for kind in ("expert_0.pth", "expert_0.partial"):
        calls.clear()
        monkeypatch.setattr(buffer, "keep_state", tear)
        assert lab.within("buffer", kind) == 1
        monkeypatch.undo()
        file = lab.path(kind, kind)
        os.truncate(file, file.stat().st_size // 2)
        capsys.readouterr()
        assert lab.within("buffer", kind) == 0
        said = capsys.readouterr().err
        assert ("the state before it is used" in said and "resumed after epoch 2" in said) == (kind == "expert_0.pth")
        one, other = (lab.path(save, "expert_0.safetensors").read_bytes() for save in ("experts", kind))
        assert one == other and not list((lab.folder / kind).rglob("*.pth"))


# Disks.


@pytest.mark.parametrize("turn", [2, 4, 7])
def test_a_disk_that_is_full_at_any_write_costs_nothing(
    lab: Lab, turn: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.fsync, list[int]()

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= turn:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    assert lab.within("dc", f"full {turn}") == 1
    said = capsys.readouterr().err
    assert "cannot be written (No space left on device" in said.splitlines()[-1] and "Traceback" not in said
    monkeypatch.undo()
    assert not list((lab.folder / f"full {turn}").rglob(".*.*"))  # no half a file
    assert lab.within("dc", f"full {turn}") == 0
    assert same_end(lab, f"full {turn}")


def test_a_log_line_that_finds_the_disk_full_is_one_line_too(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = RunFolder.metric

    def metric(self: RunFolder, **values: float) -> None:
        real(self, **values)
        if values["iteration"] == 7:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write('{"iteration": 8, "ma')  # as much as there was room for
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "metric", metric)
    assert lab.within("dc", "lines") == 1
    assert "cannot be written (No space left on device): free space" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert lab.within("dc", "lines") == 0
    assert same_end(lab, "lines")


DISKS = """
set -u
place=$1; shift
mkdir -p "$place"
mount -t tmpfs -o size=600k none "$place" || exit 9
dd if=/dev/zero of="$place/filler" bs=1k count=540 2>/dev/null
"$@" 2>"$place.full"; echo $?
rm "$place/filler"; mount -o remount,ro,size=100m "$place"
"$@" 2>"$place.read-only"; echo $?
cp -r "$place" "$place.copy"
"""


def test_a_full_and_then_a_read_only_disk_cost_nothing(lab: Lab) -> None:
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mounts in namespaces here")
    words = [sys.executable, str(ROOT / "distill_feat" / "dc.py"), *lab.words("dc", "disk")]
    done = wait(start([*own, "sh", "-c", DISKS, "sh", lab.folder / "disk", *words]))
    assert done.out.split() == ["1", "1"], done
    full, still = ((lab.folder / f"disk.{kind}").read_text() for kind in ("full", "read-only"))
    assert "No space left on device" in full.splitlines()[-1] and "free space" in full.splitlines()[-1]
    assert "Read-only file system" in still.splitlines()[-1] and "another save_dir" in still.splitlines()[-1]
    assert "Traceback" not in full + still and len(still.splitlines()) == 1
    assert lab.within("dc", "disk.copy") == 0 and same_end(lab, "disk.copy")


# Numbers that are none.


def names(lab: Lab, save: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab.path(save, "not_finite.json").read_text())
    return found


def test_gradient_matching_names_the_images_of_a_loss_that_is_not_finite(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, looked = GradientCondenser.match, list[set[int]]()

    def spoilt(self: GradientCondenser, *words: Any) -> dict[str, float]:
        looked.append(set())
        found = real(self, *words)
        return found | {"match": float("nan")} if len(looked) == 6 else found

    def read(self: ImageSet, samples: torch.Tensor, device: torch.device, read: Any = ImageSet.input) -> Any:
        if looked:
            looked[-1] |= set(samples.tolist())
        return read(self, samples, device)

    monkeypatch.setattr(GradientCondenser, "match", spoilt)
    monkeypatch.setattr(ImageSet, "input", read)
    assert lab.within("dc", "nan") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("iteration 6: the loss is not finite") and str(lab.path("nan", "not_finite.json")) in last
    found = names(lab, "nan")
    classes = found["batch"][0]["classes"]
    assert found["iteration"] == 6 and list(classes) == [str(c) for c in range(10)]
    assert {i for steps in classes.values() for step in steps for i in step} == looked[5]
    assert last_state(lab.path("nan", "state.pth"))["iteration"] == 4
    monkeypatch.undo()
    assert lab.within("dc", "nan") == 0 and same_end(lab, "nan")


def test_trajectory_matching_names_the_expert_and_the_samples(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (lab.folder / "experts").exists():
        assert lab.within("buffer", "experts") == 0
    drawn = list[tuple[int, int]]()
    real_draw, real_match = ExpertBuffer.draw, TrajectoryCondenser.match

    def draw(self: ExpertBuffer, expert: int, epoch: int) -> torch.Tensor:
        drawn.append((expert, epoch))
        return real_draw(self, expert, epoch)

    def match(self: TrajectoryCondenser, begun: Any) -> Any:
        batches[:] = [ids.tolist() for ids in begun.batches]
        found = real_match(self, begun)
        return type(found)(float("nan"), found.end, None) if begun.number[0] == 4 else found

    batches = list[list[int]]()
    monkeypatch.setattr(ExpertBuffer, "draw", draw)
    monkeypatch.setattr(TrajectoryCondenser, "match", match)
    assert lab.within("mtt", "nan of mtt") == 1
    found = names(lab, "nan of mtt")
    (seen,) = found["batch"][0]["starts"]
    assert found["iteration"] == 5 and (seen["expert"], seen["epoch"]) == drawn[-2]
    assert seen["samples"] == batches == seen["classes"]  # one sample a class


def test_distribution_matching_names_the_images(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[set[int]]()
    real_features, real_match = ImageCondenser.real_features, ImageCondenser.match

    def features(self: ImageCondenser, samples: torch.Tensor) -> torch.Tensor:
        read.append(set(samples.tolist()))
        return real_features(self, samples)

    def match(self: ImageCondenser) -> Losses:
        found = real_match(self)
        return Losses(float("nan"), found.count) if len(read) == 3 else found

    monkeypatch.setattr(ImageCondenser, "real_features", features)
    monkeypatch.setattr(ImageCondenser, "match", match)
    assert lab.within("pretrain", "nan of images") == 0 and lab.within("image", "nan of images") == 1
    found = names(lab, "nan of images")
    assert found["iteration"] == 3 and len(read) == 3
    assert {i for which in found["batch"][0]["classes"].values() for i in which} == read[2]


class Scale(torch.nn.Module):
    """Logits [B, 2] of x [B, 2] times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=x * self.w)


def test_a_teacher_whose_loss_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    def train(bad: int) -> None:
        def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((2, 2), float("nan") if step == bad else 1.0), torch.eye(2)

        settings = PretrainConfig(epochs=3, lr=0.1, batch_size=2, optimizer="sgd")
        train_member(tmp_path, 0, 3, Scale, batch, 4, settings, False, torch.device("cpu"), StopFlag(), False)

    with pytest.raises(ConfigError, match="teacher 0: the loss is not finite in epoch 2: lower pretrain.lr"):
        train(5)
    assert last_state(tmp_path / "premodel0_resume.pth")["epoch"] == 1
    keep_state(tmp_path / "premodel0_resume.pth", {"of": "another program"})
    with pytest.raises(ConfigError, match="premodel0_resume.pth: not a state of this teacher"):
        train(-1)
    drop_state(tmp_path / "premodel0_resume.pth")
    train(-1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "premodel0_epoch3.safetensors", "premodel0_init.safetensors"
    ]  # fmt: skip


def test_an_expert_names_the_images_of_its_first_step_that_is_not_finite(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = list[list[int]]()
    real = buffer.reader

    def reader(*words: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        read = real(*words)

        def spoilt(which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            looked.append(which.tolist())
            x, targets = read(which)
            return (x * float("nan") if len(looked) == 9 else x), targets

        return spoilt

    monkeypatch.setattr(buffer, "reader", reader)
    assert lab.within("buffer", "nan of experts") == 1
    assert "not finite from step 3 of epoch 2 on" in capsys.readouterr().err.splitlines()[-1]
    found = names(lab, "nan of experts")
    assert found["iteration"] == 9 and found["batch"] == {"expert": 0, "epoch": 2, "samples": looked[8]}


# Ends at random iterations. By default every trainer's own tests have one of each.


ENDS, ROUND = 20, 4  # signals of a kind, at most so many of them in a run
LONG = {
    "dc": ("condense.niter=120", "condense.save_every=120"),
    "mtt": ("condense.niter=300", "condense.save_every=300"),
    "image": (),
    "text": (),
    "kd": (),
}  # fmt: skip
SCRIPTS = {
    "dc": "distill_feat/dc.py", "mtt": "distill_feat/mtt.py", "image": "condense/condense_script.py",
    "kd": "kd/train.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def text_lab(tmp_path_factory: pytest.TempPathFactory) -> TextLab:
    return make_lab(tmp_path_factory.mktemp("texts"))


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """What a trainer has learned."""
    students = list(folder.rglob("student.safetensors"))
    if students:
        return load_file(students[0])
    (last,) = folder.rglob("syn_data_best.pth")
    found = load_synthetic(last)
    return {"data": found.data, "targets": found.targets} | ({} if found.features is None else {"f": found.features})


def lines_of(folder: Path) -> int:
    """Iterations in the log of a trainer."""
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("metrics.jsonl"))


def end(words: Sequence[str | Path], folder: Path, number: int, draw: random.Random) -> bool:
    """Start a trainer, and send the signal some random iterations later; whether it was still running."""
    process, before, until = start(words), lines_of(folder), time.monotonic() + 120
    more = draw.randrange(1, 12)
    while process.poll() is None and (lines_of(folder) in (0, before) or lines_of(folder) < before + more):
        assert time.monotonic() < until
        time.sleep(0.002)
    time.sleep(0.02 * draw.random())
    process.send_signal(number)
    done = wait(process, None)
    assert done.status in (-number, 128 + number, 0) and "Traceback" not in done.err, done
    return done.status != 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("program", LONG)
def test_signals_at_random_iterations_change_no_bit(
    lab: Lab, request: pytest.FixtureRequest, program: str, number: int
) -> None:
    texts: TextLab | None = request.getfixturevalue("text_lab") if program == "text" else None
    if program == "mtt" and not (lab.folder / "experts").exists():
        assert lab.within("buffer", "experts") == 0

    def words(save: str) -> list[str | Path]:
        if texts:
            return [sys.executable, *texts.words("condense_script_text", str(lab.folder / save))]
        return [sys.executable, ROOT / SCRIPTS[program], *lab.words(program, save, *LONG[program])]

    whole = f"{program} undisturbed"
    if program == "image":
        wait(start([sys.executable, ROOT / "condense" / "pretrain_script.py", *lab.words("image", whole)]))
    if not (lab.folder / whole).exists() or program == "image":
        wait(start(words(whole)))
    draw, ends, run = random.Random(number), 0, 0
    while ends < ENDS:
        save, run = f"{program} {number} {run}", run + 1
        for _ in range(ROUND):
            if not end(words(save), lab.folder / save, number, draw):
                break
            ends += 1
        wait(start(words(save)))
        one, other = bits(lab.folder / whole), bits(lab.folder / save)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        logs = [next((lab.folder / name).rglob("metrics.jsonl")).read_text() for name in (whole, save)]
        assert logs[0] == logs[1]
        assert run < 3 * ENDS, "the trainer ends before the signals come"
