"""DC with feature labels as users start it: ranks, ends of every sort, its start, the requirement's flags, mistakes."""

import json
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launching import ROOT, start, torchrun, wait
from torch import Tensor

from condenser.export import load_export
from condenser.feature_student import accuracy
from condenser.synthetic_set import SyntheticSet, load_synthetic
from config import add_args_from_yaml
from distill_feat import dc
from distill_feat.feat_job import FeatJob
from distill_feat.feat_rows import held_out_numbers
from utils.ddp import process_group
from utils.stopping import StopFlag, Stopped

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # within pytest's own process
PROGRAM = ROOT / "distill_feat" / "dc.py"
NITER = 12
CONFIG = {
    "base": str(ROOT / "config" / "distill_feat" / "dc" / "digits_ipc1.yaml"),
    "dataset": {"batch_real": 16},
    "network": {"width": 8},
    "pretrain": {"epochs": 1},
    "feature": {
        "form": "map", "lbd": 0.1, "lbd_contrast": 0.05, "feat_lbd": 0.05, "lr_feat": 0.1, "feat_opt": "sgd",
        "lr_feat_rel": False,
    },
    "condense": {
        "ipc": 2, "niter": NITER, "outer_loop": 2, "inner_loop": 2, "checkpoint_every": 2, "save_every": 6,
        "aug_type": "color_crop/cutout",
    },
    "evaluation": {
        "steps": 6, "repeat": 1, "probe_every": 3, "batch_invariant": "eval",
        "rows": ["distilled", "distilled_feature", "start", "start_feature", "random", "random_soft"],
    },
}  # fmt: skip
CHANNEL = ("--pooling=avg", "--n_feat=2", "--use_feature=random")
SMALL = ("--Iteration=1", "evaluation.rows=[distilled]")


@dataclass(frozen=True)
class Lab:
    """A short configuration over the shipped one, starts in common; `path` is what programs wrote before."""

    folder: Path

    def words(self, save: str, *more: str, ranks: int = 1) -> list[str | Path]:
        places = (f"save_dir={self.folder / save}", f"pretrained_dir={self.folder / 'starts'}")
        return [*torchrun(ranks), PROGRAM, f"--config_path={self.folder / 'short.yaml'}", *places, *more]

    def start(self, save: str, *more: str, ranks: int = 1) -> subprocess.Popen[str]:
        return start(self.words(save, *more, ranks=ranks))

    def within(self, save: str, *more: str) -> int:
        """Exit status of the program within this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(word) for word in self.words(save, *more)[1:]])
            return dc.main()

    def path(self, save: str, name: str) -> Path:
        (path,) = (self.folder / save).rglob(name)
        return path

    def learned(self, save: str, name: str = str(NITER)) -> SyntheticSet:
        return load_synthetic(self.path(save, f"syn_data_{name}.pth"))

    def starts(self) -> list[Path]:
        return sorted((self.folder / "starts").rglob("syn_data_0.pth"))

    def wait_for(self, process: subprocess.Popen[str], save: str, name: str, since: int = 0) -> None:
        """Return as soon as there is such a file, written after `since`."""
        until = time.monotonic() + 120
        while not any(path.stat().st_mtime_ns > since for path in (self.folder / save).rglob(name)):
            assert process.poll() is None and time.monotonic() < until, wait(process, None)
            time.sleep(0.002)


def tensors(found: SyntheticSet) -> list[Tensor]:
    assert found.features is not None
    return [found.data, found.features, found.targets]


def same_bits(one: SyntheticSet, other: SyntheticSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With undisturbed runs of one process in `map`, whose start was generated before, twice, and in `channel`."""
    lab = Lab(tmp_path_factory.mktemp("dc"))
    (lab.folder / "short.yaml").write_text(yaml.safe_dump(CONFIG))
    channel = lab.start("channel", *CHANNEL)
    assert "start written: " in wait(lab.start("unused", "--generate_pretrained")).err
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in lab.starts()}
    assert lab.within("unused", "--generate_pretrained") == 0 and not (lab.folder / "unused").exists()
    for process in (lab.start("map"), channel):
        assert "learned set: " in wait(process).err
    assert before and {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    return lab


def test_runs_start_from_exactly_what_was_generated(lab: Lab) -> None:
    starts = [load_synthetic(path) for path in lab.starts()]
    assert len(starts) == 2
    for save in ("map", "channel"):
        first, last = lab.learned(save, "0"), lab.learned(save)
        (own,) = (found for found in starts if found.meta["form"] == save)
        for a, b, c in zip(tensors(own)[:2], tensors(first)[:2], tensors(last)[:2], strict=True):
            assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-6
            assert float((c - b).abs().max()) > 1e-3
        assert own.features is not None and first.features is not None and own.features.equal(first.features)
        assert same_bits(lab.learned(save, "best"), last)


def test_one_two_and_three_ranks_learn_the_same_images_and_labels(lab: Lab) -> None:
    runs = {("map", 2): (), ("channel", 3): CHANNEL}
    processes = {key: lab.start(f"{key[0]}{key[1]}", *more, ranks=key[1]) for key, more in runs.items()}
    for (save, ranks), process in processes.items():
        wait(process)
        for name in ("6", "12"):
            found, alone = lab.learned(f"{save}{ranks}", name), lab.learned(save, name)
            for a, b in zip(tensors(found), tensors(alone), strict=True):
                assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5


def test_killed_and_interrupted_runs_go_on_to_the_same_bits(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    process = lab.start("ended")
    lab.wait_for(process, "ended", "state.pth")
    process.kill()
    wait(process, None)
    since = lab.path("ended", "state.pth").stat().st_mtime_ns
    process = lab.start("ended")
    lab.wait_for(process, "ended", "state.pth", since)
    process.send_signal(signal.SIGINT)
    ended = wait(process, 128 + signal.SIGINT)
    assert ended.last == "stopped by SIGINT; the same command goes on from here"
    assert all("resumed at iteration" in said for said in (ended.err, wait(lab.start("ended")).err))
    assert same_bits(lab.learned("ended"), lab.learned("map"))
    metrics = [json.loads(line) for line in lab.path("ended", "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == list(range(1, NITER + 1))
    assert lab.within("ended") == 0
    again = capsys.readouterr()
    assert "finished already" in again.err and "learned, with F" in again.out


def test_students_that_ended_before_a_signal_are_kept(lab: Lab) -> None:
    more = ("evaluation.steps=150", "evaluation.rows=[distilled,start,random]")
    process = lab.start("map", *more)
    lab.wait_for(process, "map", "distilled_seed0_0.json", since=time.time_ns())
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in wait(process, 128 + signal.SIGTERM).last
    written = max((lab.folder / "map").rglob("distilled_seed0_0.json"), key=lambda path: path.stat().st_mtime_ns)
    stamp = written.stat().st_mtime_ns
    assert len(list(written.parent.iterdir())) < 3
    assert lab.within("map", *more) == 0
    assert written.stat().st_mtime_ns == stamp and len(list(written.parent.iterdir())) == 3


def test_the_report_has_the_four_numbers_and_the_export_the_learned_set(lab: Lab) -> None:
    students = json.loads(lab.path("channel", "report.json").read_text())["students"]
    names = CONFIG["evaluation"]["rows"]  # type: ignore[index]
    assert [student["row"] for student in students] == names
    assert {"last", "last_views", "selected", "selected_views"} < students[0].keys()
    exported = load_export(lab.path("channel", "set.safetensors").parent)
    assert same_bits(exported, lab.learned("channel", "best"))
    assert {"form": "channel", "pooling": "avg", "lbd": 0.1, "scope": "sample"}.items() <= exported.meta.items()


@pytest.fixture
def run(lab: Lab, tmp_path: Path) -> Callable[..., int]:
    """The program within this process, with folders of its own: its exit status."""
    places = (f"save_dir={tmp_path / 'results'}", f"pretrained_dir={tmp_path / 'starts'}")
    return partial(lab.within, "", *places)


def values_of(out: str) -> dict[str, str]:
    """What a dry run prints."""
    lines = [line.split(": ", 1) for line in out.splitlines() if line.startswith("  ")]
    return {name.strip(): value.rsplit("  [", 1)[0] for name, value in lines}


TAIL = "--tta_mode 'hflip'  --batch_real 256 --batch_train 256"
REQUIRED = {  # the requirement's commands, its program's name apart; steps and epochs between, image-equivalents
    "--dataset 'CIFAR10' --init real --ipc 9 --lbd 0.1 --lbd-contrast 0.05 --batch_invariant 'eval' --tta": (
        "cifar10", "10", "9", "0.1", "10 steps, 50 epochs", "15.00"
    ),
    "--dataset 'CIFAR10' --init real --ipc 48 --lbd 0.01 --lbd-contrast 0.05 --tta": (
        "cifar10", "10", "48", "0.01", "50 steps, 10 epochs", "80.00"
    ),
    "--dataset 'CIFAR100' --init real --ipc 9 --lbd 0.01 --lbd-contrast 0.05 --batch_invariant 'eval' --tta": (
        "cifar100", "100", "9", "0.01", "10 steps, 50 epochs", "15.00"
    ),
    "--dataset 'CIFAR100' --init real --ipc 48 --lbd 0.01 --lbd-contrast 0.05 --batch_invariant 'eval' --tta": (
        "cifar100", "100", "48", "0.01", "50 steps, 10 epochs", "80.00"
    ),
}  # fmt: skip


@pytest.mark.parametrize("generate", ["", " --generate_pretrained"])
@pytest.mark.parametrize("command", REQUIRED)
def test_the_requirement_s_commands_mean_what_they_say(
    command: str, generate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(f"{PROGRAM} --data_path /some/where {command} {TAIL}{generate} --dry_run")
    monkeypatch.setattr(sys, "argv", words)
    assert dc.main() == 0
    said = capsys.readouterr()
    data, nclass, ipc, lbd, work, size = REQUIRED[command]
    expected = {
        "dataset.dataset": data, "dataset.nclass": nclass, "dataset.size": "32", "dataset.data_dir": "/some/where",
        "network.net_type": "convnet", "network.norm_type": "instance", "network.depth": "3", "network.width": "128",
        "condense.ipc": ipc, "condense.init": "real", "condense.batch_train": "256", "dataset.batch_real": "256",
        "feature.lbd": lbd, "feature.lbd_contrast": "0.05", "feature.form": "map", "feature.layer_idx": "None",
        "evaluation.tta": "True", "evaluation.tta_mode": "hflip", "generate_pretrained": str(bool(generate)),
    }  # fmt: skip
    if "--batch_invariant" in command:
        expected["evaluation.batch_invariant"] = "eval"
    assert expected.items() <= values_of(said.out).items() and not said.err
    assert f" x {work} between" in said.out and f"as many bytes as {size} images" in said.out
    assert "dataset.data_dir: /some/where is absent" in said.out


def test_the_requirement_s_other_flags_reach_the_labels(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--lr_feat 0.2 --feat-opt adam --pooling max --layer-idx 2 --feat-lbd 0.02 --n-feat 3 --use-feature random"
    assert run(*shlex.split(flags), "--dry_run") == 0
    expected = {
        "lr_feat": "0.2", "feat_opt": "adam", "form": "channel", "pooling": "max", "layer_idx": "2",
        "feat_lbd": "0.02", "n_feat": "3", "use_feature": "random",
    }  # fmt: skip
    values = values_of(capsys.readouterr().out)
    assert {f"feature.{name}": value for name, value in expected.items()}.items() <= values.items()
    assert run("--layer-idx", "2", "--layer-idx", "none", "--pooling", "max", "--pooling", "none", "--dry_run") == 0
    values = values_of(capsys.readouterr().out)
    assert (values["feature.layer_idx"], values["feature.form"], values["feature.pooling"]) == ("None", "map", "avg")


@pytest.mark.parametrize(
    ("more", "parts", "status"),
    [
        ("--lbd-contrst 0.05", ["--lbd_contrst: unknown option", "did you mean '--lbd_contrast'?"], 2),
        ("--dataset cifar10", ["'cifar10' is not one of", "did you mean 'CIFAR10'?"], 2),
        ("--tta_mode flip", ["view: flip is not one of", "did you mean 'hflip'?"], 2),
        ("--aug_type crop_cutuot", ["did you mean 'cutout'?"], 2),
        ("--feat-lbd 0.1 feature.form=spatial", ["feat_lbd: 0.1", "form: spatial", "set feat_lbd: 0"], 2),
        ("--init load", ["load_path: required for init: load", "syn_data_*.pth"], 2),
        ("--no_learn_images feature.learn=false", ["learn_images: false", "set it true, feature.learn: true"], 2),
        ("--no_learn_images feature=null", ["learn_images: false", "set it true, feature.learn: true"], 2),
        ("--batch_invariant train network.norm_type=batch", ["norm_type: batch mixes", "norm_type: instance"], 2),
        ("--layer-idx 9", ["feature.layer_idx: 9", "blocks 1 to 3"], 1),
        ("--data_path /no/such --dataset CIFAR10", ["/no/such", "set dataset.data_dir"], 1),
        ("--ipc 500", ["condense.ipc: 500", "a class has 130", "lower it"], 1),
        ("--init load --load_path /no/such.pth", ["/no/such.pth: no such file"], 1),
        ("--init load --load_path SET --ipc 3", ["has 2 images a class", "condense.ipc is 3"], 1),
        ("--init load --load_path SET dataset.size=8", ["shape (1, 16, 16)", "config has (1, 8, 8)", "size"], 1),
        ("--init load --load_path MOSAIC", ["factor 2", "take factor: 1"], 1),
    ],
)
def test_mistake_is_one_line_with_its_remedy(
    lab: Lab, run: Callable[..., int], tmp_path: Path, more: str, parts: list[str], status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = lab.learned("map")
    replace(found, meta=found.meta | {"factor": 2}).save(tmp_path / "mosaic.pth")
    names = {"SET": str(lab.path("map", f"syn_data_{NITER}.pth")), "MOSAIC": str(tmp_path / "mosaic.pth")}
    assert run("evaluation.rows=[distilled]", *(names.get(word, word) for word in more.split())) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert not list((tmp_path / "results").rglob("state.pth"))


def test_a_mistake_s_exit_status_is_the_process_s() -> None:
    words = [sys.executable, "distill_feat/dc.py", "--dataset", "CIFAR10", "--data_path", "/no/such", "--ipc", "9"]
    done = wait(start(words), 1)
    assert done.err.count("\n") == 1 and "dataset.data_dir: no folder /no/such" in done.last


def test_a_loaded_set_brings_its_images_and_labels_of_the_same_kind(
    lab: Lab, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, path = lab.learned("map"), tmp_path / "loaded.pth"
    known.save(path)
    load = ("--init=load", f"--load_path={path}", "--generate_pretrained")
    runs = {"same": (), "two": ("--n_feat=2",), "pooled": ("--pooling=avg",), "class": ("feature.scope=class",)}
    found = {}
    for name, more in runs.items():
        assert run(*load, *more, f"pretrained_dir={tmp_path / name}") == 0
        assert ("are of another kind" in capsys.readouterr().err) == (name != "same")
        (start,) = (tmp_path / name).rglob("syn_data_0.pth")
        found[name] = load_synthetic(start)
        assert torch.equal(found[name].data, known.data)
    assert same_bits(found["same"], known)
    shapes = [tuple(one.features.shape) for one in found.values() if one.features is not None]
    assert shapes == [(1, 20, 8, 2, 2), (2, 20, 8, 2, 2), (1, 20, 8), (1, 10, 8, 2, 2)]
    replace(known, data=1 - known.data).save(path)
    assert run(*load, f"pretrained_dir={tmp_path / 'same'}") == 0
    assert len(list((tmp_path / "same").rglob("syn_data_0.pth"))) == 2  # what is loaded is known by its bytes


def cifar100(folder: Path, value: int = 0, classes: int = 12) -> None:
    folder.mkdir(exist_ok=True)
    labels = np.arange(4 * classes) % classes
    noise = np.random.default_rng(value).integers(0, 256, (len(labels), 3072), np.uint8)
    part = {"data": noise, "fine_labels": labels.tolist()}
    names = {"fine_label_names": [f"class {c}" for c in range(classes)]}
    for name, values in {"meta": names, "train": part, "test": part}.items():
        (folder / name).write_bytes(pickle.dumps(values))


def test_a_start_made_from_other_data_is_refused_and_debug_keeps_the_first_classes(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar100(tmp_path / "data")
    data = ("--dataset=CIFAR100", f"--data_path={tmp_path / 'data'}", "dataset.nclass=12", "--ipc=1", *SMALL)
    assert run(*data, "--generate_pretrained") == 0
    assert run(*data, "debug=true") == 0
    (path,) = (tmp_path / "results").rglob("syn_data_1.pth")
    found = load_synthetic(path)
    assert found.owner.tolist() == list(range(10)) and found.targets.shape == (10, 12)
    cifar100(tmp_path / "data", 1)
    capsys.readouterr()
    for more in (("--generate_pretrained",), ()):
        assert run(*data, *more) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "made from other data" in line and "delete the folder" in line


def test_a_random_row_has_an_image_where_the_budget_holds_none(run: Callable[..., int], tmp_path: Path) -> None:
    rows = "evaluation.rows=[distilled,random,random_soft]"  # an image with ten numbers is more than an image
    assert run("feature=null", "--ipc=1", "--Iteration=1", rows) == 0
    (path,) = (tmp_path / "results").rglob("report.json")
    table = json.loads(path.read_text())["table"].splitlines()
    assert [line.split()[-4:-2] for line in table[-3:]] == [["1", "1.00"], ["1", "1.00"], ["1", "1.04"]]


@contextmanager
def job_of(lab: Lab, *more: str) -> Iterator[FeatJob[dc.DcConfig]]:
    cfg = add_args_from_yaml(dc.DcConfig, lab.folder / "short.yaml", more, PROGRAM.parent).config
    with process_group(torch.device("cpu")) as world:
        yield FeatJob(cfg, world, StopFlag())


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_networks_read_from_their_files_have_learned_the_classes(lab: Lab, norm: str, tmp_path: Path) -> None:
    with job_of(lab, f"network.norm_type={norm}", "network.width=16", f"pretrained_dir={tmp_path}") as job:
        for _ in range(2):
            (net,) = job.trained(1, 6)
            assert accuracy(net, job.test, "none", "off", job.world.device) > 80


def test_validation_scores_all_four_numbers_and_a_signal_ends_it_at_once(lab: Lab) -> None:
    with job_of(lab, "evaluation.steps=2") as job:
        assert list(held_out_numbers(job, lab.learned("map"), 0)) == ["no F", "no F, views", "F", "F, views"]
        job.flag.number = signal.SIGTERM
        with pytest.raises(Stopped):
            held_out_numbers(job, lab.learned("map"), 0)
