"""Distillation as users start it: methods, groups, ranks, ends of every sort, command lines, sweeps, mistakes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from launching import ENV, ROOT, start, torchrun, wait
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import add_args_from_yaml, parse_command_line
from kd import evaluate, train
from kd.kd_batches import Batches
from kd.kd_config import METHODS, OPTIONS, KdConfig
from kd.kd_data import load_kd_data
from kd.places import run_folder
from kd.scoring import COLUMNS, calibration_error, fit_temperature, result_table, score
from kd.student_run import StudentRun
from kd.teacher import Teacher, teacher_file
from scripts import fetch_teachers, sweep
from utils.ddp import process_group
from utils.kd_networks import kd_network
from utils.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # within pytest's own process
CONFIGS = ROOT / "config" / "kd"
SHORT = {
    "base": str(CONFIGS / "digits" / "base.yaml"),
    "DATASET": {"SIZE": 16, "PAD": 2, "PER_CLASS": 8, "VAL_FRACTION": 0.25, "TEST": {"BATCH_SIZE": 100}},
    "DISTILLER": {"TYPE": "SDD_KD_LSKD", "TEACHER": "resnet14_sdd", "STUDENT": "resnet8_sdd"},
    "SOLVER": {"BATCH_SIZE": 16, "EPOCHS": 2, "LR": 0.05, "LR_DECAY_STAGES": [1]},
    "KD": {"TEMPERATURE": 1.2, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 2.0}},
}
TEACHER = ("DISTILLER.TYPE=NONE", "DISTILLER.STUDENT=resnet14", "EXPERIMENT.SAVE_AS_TEACHER=true")


@dataclass(frozen=True)
class Lab:
    """A short configuration over the shipped one, and its teacher in `save`; every test has results of its own."""

    folder: Path

    def places(self, save: str) -> tuple[str, str]:
        return f"LOG.PREFIX={self.folder / save}", f"DISTILLER.TEACHERS={self.folder / 'save'}"

    def words(self, save: str, *more: str) -> list[str]:
        configs = () if any("--cfg" in word for word in more) else (f"--cfg={self.file}",)
        return [*configs, *self.places(save), *more]

    @property
    def file(self) -> Path:
        return self.folder / "short.yaml"

    def start(self, save: str, *more: str, ranks: int = 1) -> subprocess.Popen[str]:
        return start([*torchrun(ranks), ROOT / "kd" / "train.py", *self.words(save, *more)])

    def within(self, save: str, *more: str, program: str = "train") -> int:
        """Exit status of the program within this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{program}.py", *self.words(save, *more)])
            return {"train": train, "evaluate": evaluate}[program].main()

    def runs(self, save: str) -> dict[str, Path]:
        """Folders of finished runs by their names without the hash."""
        found = sorted((self.folder / save).rglob("result.json"))
        return {path.parent.name.rsplit("_", 1)[0]: path.parent for path in found}

    def only(self, save: str) -> Path:
        (folder,) = self.runs(save).values()
        return folder

    def config(self, *more: str) -> KdConfig:
        command = parse_command_line(self.words("unused", *more), "", OPTIONS)
        path, own = command.configs[0]
        return add_args_from_yaml(KdConfig, path, (*command.overrides, *own), ROOT).config


def numbers(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "result.json").read_text())
    assert isinstance(found, dict)
    return {name: value for name, value in found.items() if "seconds" not in name}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "student.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With a trained teacher, and an undisturbed student in `alone`."""
    lab = Lab(tmp_path_factory.mktemp("kd"))
    lab.file.write_text(yaml.safe_dump(SHORT))
    assert lab.within("teacher", *TEACHER) == 0
    assert (lab.folder / "save" / "digits" / "resnet14_vanilla" / "resnet14.safetensors").exists()
    assert lab.within("alone") == 0
    return lab


def test_every_method_trains_in_one_group(lab: Lab) -> None:
    assert len(METHODS) == 13
    assert (
        lab.within("methods", *(f"--cfg={lab.file} DISTILLER.TYPE={name}" for name in METHODS), "SOLVER.EPOCHS=1") == 0
    )
    runs = lab.runs("methods")
    assert len(runs) == 13
    for name, folder in runs.items():
        (line,) = lines(folder)
        assert all(map(np.isfinite, line.values())) and ("vanilla" in name) == (line["train_kd"] == 0)
        assert {"top1", "top5", "nll", "ece", "best_top1", "temperature"} <= numbers(folder).keys()
        assert ("agreement" in numbers(folder)) == ("vanilla" not in name)
        assert (folder / "report.html").exists()
    assert {"SDD_KD_resnet14_resnet8_M1-2-4_seed0", "KD_LSKD_resnet14_resnet8_M1_seed0"} <= runs.keys()


def test_runs_of_a_group_end_as_each_alone(lab: Lab) -> None:
    group = ("", " M=[1]", " DISTILLER.TYPE=SDD_DKD SOLVER.EPOCHS=1", " DISTILLER.TYPE=NONE")
    assert lab.within("group", *(f"--cfg={lab.file}{more}" for more in group)) == 0
    together = lab.runs("group")
    for more in group[1:]:
        assert lab.within("apart", f"--cfg={lab.file}{more}") == 0
    apart = lab.runs("apart") | lab.runs("alone")
    assert apart.keys() == together.keys()
    for name in together:
        assert difference(apart[name], together[name]) <= 1e-5
        assert numbers(apart[name]) == pytest.approx(numbers(together[name]), rel=1e-5)


def test_a_killed_and_a_stopped_run_go_on_to_the_same_bits(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("SOLVER.EPOCHS=12",)
    assert lab.within("undisturbed", *more) == 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = {path.stat().st_mtime_ns for path in (lab.folder / "ended").rglob("state.pth")}
        ended, until = lab.start("ended", *more), time.monotonic() + 120
        while {path.stat().st_mtime_ns for path in (lab.folder / "ended").rglob("state.pth")} <= before:
            assert ended.poll() is None and time.monotonic() < until
            time.sleep(0.002)
        ended.send_signal(number)
        said = wait(ended, -number if number == signal.SIGKILL else 128 + number)
    assert said.last == "stopped by SIGTERM; the same command goes on from here"
    assert lab.within("ended", *more) == 0 and "resumed after step" in capsys.readouterr().err
    one, other = lab.only("ended"), lab.only("undisturbed")
    assert difference(one, other) == 0 and numbers(one) == numbers(other)
    assert lines(one) == lines(other) and [line["epoch"] for line in lines(one)] == list(range(1, 13))


def test_a_run_is_skipped_when_finished(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    stamp = (lab.only("alone") / "student.safetensors").stat().st_mtime_ns
    assert lab.within("alone") == 0
    assert "finished already" in capsys.readouterr().err
    assert (lab.only("alone") / "student.safetensors").stat().st_mtime_ns == stamp


def test_two_ranks_with_half_the_batch_are_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without batch norm, whose statistics are of a rank's share; the last batch of an epoch is uneven."""
    monkeypatch.setitem(ENV, "PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), *ENV.get("PYTHONPATH", "").split()]))
    more = ("DISTILLER.STUDENT=mini_students:group_norm", "SOLVER.BATCH_SIZE=14", "DATASET.VAL_FRACTION=0")
    process = lab.start("ranks2", *more, ranks=2)
    assert lab.within("ranks1", *more) == 0
    wait(process)
    one, two = lab.only("ranks1"), lab.only("ranks2")
    assert difference(one, two) <= 1e-5 and numbers(one) == pytest.approx(numbers(two), rel=1e-4)
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_kept_teacher_logits_of_as_many_views_as_epochs_change_nothing_but_rounding(lab: Lab) -> None:
    assert lab.within("kept", "KD.CACHE_VIEWS=2") == 0
    kept, alone = lines(lab.only("kept")), lines(lab.only("alone"))
    for a, b in zip(kept, alone, strict=True):
        assert a["train_ce"] == pytest.approx(b["train_ce"], rel=2e-3)
        assert a["train_kd"] == pytest.approx(b["train_kd"], rel=2e-3) and a["train_kd"] != b["train_kd"]


def test_learning_rate_decays_after_a_stage_and_the_best_epoch_has_its_own_column(lab: Lab) -> None:
    found = lines(lab.only("alone"))
    assert [line["lr"] for line in found] == pytest.approx([0.05, 0.005])
    assert [line["best_top1"] for line in found] == list(np.maximum.accumulate([line["test_top1"] for line in found]))
    assert numbers(lab.only("alone"))["top1"] == found[-1]["test_top1"]


def test_a_checkpoint_has_the_student_and_no_teacher(lab: Lab) -> None:
    folder = lab.only("alone")
    saved = load_file(folder / "student.safetensors")
    assert (
        sum(value.numel() for name, value in saved.items() if "running" not in name and "num_" not in name)
        == (numbers(folder)["parameters"])
    )
    state = torch.load(folder / "state.pth", weights_only=True)
    assert state["net"].keys() == saved.keys()


def test_the_export_gives_the_student_s_logits_without_our_code(lab: Lab, tmp_path: Path) -> None:
    code = (
        "import sys, torch; net = torch.export.load(sys.argv[1]).module(); x = torch.linspace(0, 1, 3 * 256);"
        "torch.save(net(x.view(3, 1, 16, 16)), 'y.pt');"
        "assert not {'kd', 'utils', 'config'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", code, lab.only("alone") / "student.pt2"], cwd=tmp_path, check=True)
    data = load_kd_data(lab.config().DATASET)
    teacher = Teacher("resnet8", lab.only("alone") / "student.safetensors", data, False, torch.device("cpu"))
    x = data.train.normaliser(torch.linspace(0, 1, 3 * 256).view(3, 1, 16, 16))
    assert torch.allclose(torch.load(tmp_path / "y.pt"), teacher.net(x).logits, atol=1e-5)


def test_evaluation_of_a_checkpoint_gives_the_run_s_numbers(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    file = lab.only("alone") / "student.safetensors"
    assert lab.within("unused", f"--checkpoint={file}", program="evaluate") == 0
    cells = capsys.readouterr().out.splitlines()[-1].split()
    found = numbers(lab.only("alone"))
    names = ("top1", "top5", "nll", "ece", "nll_scaled", "ece_scaled", "held_out_top1")
    assert [float(cell) for cell in cells[1:]] == pytest.approx([found[name] for name in names], abs=0.006)


def table(out: str) -> list[dict[str, str]]:
    """Rows of a printed table by column."""
    words = [re.split(r" {2,}", line.strip()) for line in out.splitlines() if line.strip()]
    return [dict(zip(words[0], row, strict=True)) for row in words[2:]]


def test_a_network_against_itself_agrees_in_all(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    file = lab.only("alone") / "student.safetensors"
    more = (f"--checkpoint={file}", f"--against={file}", "DISTILLER.TEACHER=resnet8")
    assert lab.within("unused", *more, program="evaluate") == 0
    one, other = table(capsys.readouterr().out)
    names = ("agreement", "KL to teacher", "JS to teacher", "CKA")
    assert [one[name] for name in names] == ["100.00", "0.000", "0.000", "100.00"]
    assert one["NLL"] == other["NLL"] and {other[name] for name in names} == {"-"}


def test_a_student_against_its_teacher_is_as_faithful_as_its_run_says_on_two_ranks_as_well(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    file, found = lab.only("alone") / "student.safetensors", numbers(lab.only("alone"))
    more = (f"--checkpoint={file}", f"--against={teacher_file(lab.config())}")
    two = start([*torchrun(2), ROOT / "kd" / "evaluate.py", *lab.words("unused", *more)])
    assert lab.within("unused", *more, program="evaluate") == 0
    one, other = rows = table(capsys.readouterr().out)
    digits = {"agreement": 2, "kl_to_teacher": 3, "js_to_teacher": 3, "cka": 2, "top1": 2}
    assert [one[COLUMNS[name]] for name in digits] == [f"{found[name]:.{d}f}" for name, d in digits.items()]
    assert other["top-1, last"] == f"{found['teacher_top1']:.2f}"
    assert table(wait(two).out) == rows


def test_a_file_to_compare_to_has_a_network_s_name(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("DISTILLER.TYPE=NONE", "DISTILLER.TEACHER=null", "--checkpoint=/no", "--against=/other")
    assert lab.within("unused", *more, program="evaluate") == 2
    said = capsys.readouterr().err
    assert "AGAINST: /other is of DISTILLER.TEACHER, which is not set; name the network" in said.splitlines()[-1]


def test_fidelity_of_takd_is_to_the_teacher_and_its_report_names_and_draws_its_mechanisms(lab: Lab) -> None:
    chain = ("DISTILLER.TYPE=KD", "ASSISTANTS.NETWORKS=[resnet8x4]", "ASSISTANTS.DENSE=false")
    assert lab.within("takd", *chain, "CTKD.START=4", "KCD.PERIOD=1") == 0
    cfg = lab.config(*chain, "CTKD.START=4", "KCD.PERIOD=1", *lab.places("takd"))
    found, of_teacher = numbers(run_folder(cfg)), numbers(lab.only("teacher"))
    for name in ("top1", "top5", "nll", "ece"):
        assert found[f"teacher_{name}"] == pytest.approx(of_teacher[name], rel=1e-4)
    report = (run_folder(cfg) / "report.md").read_text()
    first = report.split("\n\n")[1]
    assert all(word in first for word in ("KD+CTKD+KCD", "ASSISTANTS resnet8x4", "TAKD", "resnet14"))
    training = report[report.index("## Training") :]
    assert all(f"images/{name}.png" in training for name in ("curves", "temperature", "samples"))
    assert (run_folder(cfg) / "images" / "samples.png").exists()


def test_accuracy_of_bingo_is_that_of_the_fitted_head_only(lab: Lab) -> None:
    assert lab.within("bingo", "DISTILLER.TYPE=BINGO", "BINGO.QUEUE=50") == 0
    found, folder = numbers(lab.only("bingo")), lab.only("bingo")
    assert not {"best_top1", "best_epoch"} & found.keys() and {"top1", "agreement"} <= found.keys()
    assert not any("top" in name or "best" in name for line in lines(folder) for name in line)
    assert not (folder / "student_best.safetensors").exists() and (folder / "student.safetensors").exists()
    assert "fitted to the labels at the end" in (folder / "report.md").read_text()
    rows = result_table([("BINGO", found), ("KD", numbers(lab.only("alone")))])
    assert rows.rows[0][rows.header.index("top-1, best")] == "-"


class Waits(TorchDispatchMode):
    """Operations that a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["SDD_KD_LSKD", "SDD_DKD", "SDD_NKD_LSKD"])
def test_no_step_waits_for_the_device(lab: Lab, method: str, tmp_path: Path) -> None:
    cfg = lab.config(f"DISTILLER.TYPE={method}", f"LOG.PREFIX={tmp_path}")
    with process_group(torch.device("cpu")) as world:
        data = load_kd_data(cfg.DATASET)
        batches = Batches(data, cfg, world)
        teacher = Teacher("resnet14_sdd", teacher_file(cfg), data, False, world.device)
        run = StudentRun(cfg, RunFolder(run_folder(cfg), {}, world), data, batches, [teacher], world)
        batches.begin(0)
        with Waits() as waits:
            batch = batches.get(0)
            run.step(batch, [teacher.see(batch.x, [run.regions])[run.regions]], 0)
        assert not waits.found
        run.folder.end_log()


def test_shipped_configurations_resolve() -> None:
    files = [path for path in CONFIGS.rglob("*.yaml") if path.name != "base.yaml" and path.parent.name != "text"]
    assert len(files) > 45
    for path in files:
        add_args_from_yaml(KdConfig, path, (), ROOT)


def test_manifests_are_the_requirement_s_suites() -> None:
    cifar = sweep.read_sweep(CONFIGS / "manifests" / "cifar100.txt", [0], [])
    assert len(cifar) == 23 and sum("ours" in run.origin for run in cifar) == 3
    assert len({run.program.group(run.cfg) for run in cifar}) == 2  # a teacher each
    assert {run.cfg.DISTILLER.TYPE for run in cifar} == {"SDD_KD_LSKD"}
    assert sum(run.cfg.M == (1, 4) for run in cifar) == 5
    cub = sweep.read_sweep(CONFIGS / "manifests" / "cub200.txt", [0, 1], [])
    assert sum(run.cfg.distils for run in cub) == 24 and sum(not run.cfg.distils for run in cub) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--M [1,2]", (1, 2)), ("--M '[1, 2]'", (1, 2)), ("--M 1,2", (1, 2)), ("--M=[4,1,2]", (1, 2, 4)),
        ("M=1", (1,)), ("M [1,3,7]", (1, 3, 7)), ("SOLVER.EPOCHS 5 --M '[1,4]' --gpu 0", (1, 4)),
    ],
)  # fmt: skip
def test_scales_are_written_as_one_likes(lab: Lab, words: str, expected: tuple[int, ...]) -> None:
    assert expected == lab.config(*shlex.split(words)).M


def test_pairs_and_overrides_mix_and_the_last_wins(lab: Lab) -> None:
    words = "EXPERIMENT.TAG a,b SOLVER.EPOCHS 7 KD.LOSS.KD_WEIGHT=3 SOLVER.LR_DECAY_STAGES [4,6] SOLVER.EPOCHS=8"
    cfg = lab.config(*shlex.split(words))
    assert (cfg.SOLVER.EPOCHS, cfg.KD.LOSS.KD_WEIGHT, cfg.SOLVER.LR_DECAY_STAGES) == (8, 3.0, (4.0, 6.0))
    assert cfg.EXPERIMENT.TAG == "a,b"


def test_a_run_killed_before_its_first_state_logs_no_epoch_twice(lab: Lab) -> None:
    folder = run_folder(lab.config(f"LOG.PREFIX={lab.folder / 'early'}"))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"iteration": 5, "epoch": 1}\n')
    assert lab.within("early") == 0
    assert [line["epoch"] for line in lines(folder)] == [1, 2]


def test_quick_is_five_epochs_with_scaled_stages() -> None:
    path = CONFIGS / "cifar100" / "sdd_kd_lskd" / "res32x4_res8x4.yaml"
    cfg = add_args_from_yaml(KdConfig, path, ("QUICK=true",), ROOT).config
    assert cfg.epochs == 5
    assert [cfg.rate(epoch) for epoch in range(1, 6)] == pytest.approx([0.05, 0.05, 0.05, 0.05e-2, 0.05e-3])
    dkd = add_args_from_yaml(KdConfig, CONFIGS / "cifar100" / "dkd" / "res32x4_res8x4.yaml", (), ROOT).config
    assert dkd.warmup == 20


def test_the_requirement_s_yaml_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(
        'DISTILLER:\n  TYPE: "SDD_KD_LSKD"\n  TEACHER: "resnet32x4_sdd"\n  STUDENT: "resnet8x4_sdd"\n'
        "KD:\n  TEMPERATURE: 2.0\n  LOSS:\n    CE_WEIGHT: 1.0\n    KD_WEIGHT: 9.0\n"
        "SOLVER:\n  EPOCHS: 240\n  BATCH_SIZE: 64\n  LR: 0.05\n"
    )
    cfg = add_args_from_yaml(KdConfig, tmp_path / "theirs.yaml", (), ROOT).config
    ours = CONFIGS / "cifar100" / "sdd_kd_lskd" / "res32x4_res8x4.yaml"
    assert cfg.model_dump(exclude={"EXPERIMENT"}) == add_args_from_yaml(KdConfig, ours, (), ROOT).config.model_dump(
        exclude={"EXPERIMENT"}
    )
    assert cfg.DATASET.ROOT == ROOT / "data" and "M1-2-4_seed0" in run_folder(cfg).name


def test_seed_and_scales_have_folders_of_their_own(lab: Lab) -> None:
    folders = {run_folder(lab.config(f"SEED={seed}", f"M={m}")) for seed in (0, 1) for m in ("[1]", "[1,2]", "[1,4]")}
    assert len(folders) == 6
    assert run_folder(lab.config("DATASET.ROOT=/elsewhere", "DISTILLER.TEACHERS=/x")) == run_folder(lab.config())
    baseline = lab.config("DISTILLER.TYPE=NONE", "M=[1]", "KD.TEMPERATURE=9")
    assert run_folder(baseline) == run_folder(lab.config("DISTILLER.TYPE=NONE"))


@pytest.mark.parametrize(
    ("more", "parts", "status"),
    [
        ("DISTILLER.TEACHER=resnet56", ["save/digits/resnet56_vanilla: no teacher resnet56", "train it", "or name"], 1),
        ("DISTILLER.TEACHER_PATH=/no/such.pth", ["/no/such.pth: no teacher resnet14"], 1),
        ("DISTILLER.TEACHER=null", ["DISTILLER.TYPE: SDD_KD_LSKD needs DISTILLER.TEACHER", "set TYPE: NONE"], 2),
        ("DISTILLER.TYPE=SDD_KD_LSDK", ["no method 'SDD_KD_LSDK'", "did you mean 'SDD_KD_LSKD'?"], 2),
        ("SOLVER.EPOCH 5", ["SOLVER.EPOCH: unknown key; did you mean 'EPOCHS'?"], 2),
        ("--M '[2,4]'", ["command line: M: [2, 4] lacks 1", "add it"], 2),
        ("--M '[1;2]'", ["M: "], 2),
        ("DISTILLER.STUDENT=resnet9", ["DISTILLER.STUDENT: network 'resnet9' is not known"], 2),
        ("COMPAT=sdd_nkd", ["COMPAT", "sdd_nkd", "base is kd"], 2),
        ("SOLVER.EPOCHS", ["'SOLVER.EPOCHS': expected section.key=value"], 2),
        ("DATASET.TYPE=imagenet", ["IN_MEMORY: true", "set IN_MEMORY: false"], 2),
        ("DATASET.TYPE=tinyimagenet DATASET.ROOT=/no/such", ["/no/such/tinyimagenet", "set DATASET.ROOT"], 1),
        ("SOLVER.LR=1e9", ["epoch 1: the loss is not finite", "lower SOLVER.LR"], 1),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(
    lab: Lab, more: str, parts: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "tinyimagenet" in more:  # the teacher is looked for first
        more += f" DISTILLER.TEACHER_PATH={lab.folder / 'save/digits/resnet14_vanilla/resnet14.safetensors'}"
    assert lab.within("mistakes", *shlex.split(more)) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(part in line for part in parts), line


def test_without_its_teacher_a_run_makes_no_folder(lab: Lab) -> None:
    assert lab.within("nothing", "DISTILLER.TEACHER_PATH=/no/such.pth") == 1
    assert not (lab.folder / "nothing").exists()


@pytest.mark.parametrize(
    ("second", "part"),
    [
        ("SEED=1", "SEED: 0 and 1 in one group"),
        ("DISTILLER.TEACHER=resnet20", "DISTILLER.TEACHER: resnet14_sdd and resnet20 in one group"),
        ("SOLVER.BATCH_SIZE=8", "SOLVER.BATCH_SIZE: 16 and 8 in one group"),
        ("EXPERIMENT.TAG=x", "the same run twice"),
    ],
)
def test_a_group_shares_teacher_and_batches(
    lab: Lab, second: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.within("mistakes", f"--cfg={lab.file}", f"--cfg={lab.file} {second}") == 1
    assert part in capsys.readouterr().err


def test_another_teacher_under_a_begun_run_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.within("swapped", "SOLVER.EPOCHS=1") == 0
    (lab.only("swapped") / "result.json").unlink()
    other = lab.folder / "other.safetensors"
    weights = load_file(lab.folder / "save" / "digits" / "resnet14_vanilla" / "resnet14.safetensors")
    save_file({name: value * 1 if "num_" in name else value * 1.01 for name, value in weights.items()}, other)
    assert lab.within("swapped", "SOLVER.EPOCHS=1", f"DISTILLER.TEACHER_PATH={other}") == 1
    assert "made from other data" in (said := capsys.readouterr().err) and "--overwrite" in said


def test_a_temperature_that_looks_wrong_for_the_classes_is_said(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    for temperature, said in ((4.0, True), (1.2, False)):
        assert lab.within(f"hint{said}", f"KD.TEMPERATURE={temperature}", "SOLVER.EPOCHS=1") == 0
        assert ("with 10 classes: standardised logits suggest 1.2" in capsys.readouterr().err) == said


def test_a_sweep_skips_what_is_finished_and_reports_a_crash_as_one(lab: Lab, tmp_path: Path) -> None:
    manifest = tmp_path / "two.txt"
    manifest.write_text(
        f"[ours] kd/train.py\ngood {lab.file}\nbad {lab.file} DISTILLER.TEACHER=resnet56\n"
        f"same {lab.file} M=[1,2,4]  # once\n"
    )
    words = [sys.executable, "-m", "scripts.sweep", manifest, "--logs", tmp_path / "logs", *lab.places("alone")]
    stamp = (lab.only("alone") / "student.safetensors").stat().st_mtime_ns
    done = wait(start(words), 1)
    assert "NOT FINISHED  bad, seed 0: " in done.last and "no teacher resnet56" in done.last
    assert (lab.only("alone") / "student.safetensors").stat().st_mtime_ns == stamp
    top1 = f"{numbers(lab.only('alone'))['top1']:.2f}"
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[:4] for row in rows[-2:]] == [["good", "ours", "1/1", top1], ["bad", "ours", "0/1", "-"]]
    assert (tmp_path / "logs" / "report.html").exists() and "no teacher" in (
        tmp_path / "logs/bad_seed0.log"
    ).read_text()


def test_public_teachers_are_fetched_from_the_first_link_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = kd_network("resnet8", 100, 3, 32, 0, "test")
    (tmp_path / "resnet8_vanilla").mkdir()
    torch.save({"model": net.state_dict(), "epoch": 240}, tmp_path / "resnet8_vanilla" / "ckpt_epoch_240.pth")
    with tarfile.open(tmp_path / "teachers.tar", "w") as file:
        file.add(tmp_path / "resnet8_vanilla", "cifar_teachers/resnet8_vanilla")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url, save = f"http://127.0.0.1:{server.server_port}", tmp_path / "save"
    monkeypatch.setattr(fetch_teachers, "ARCHIVES", ())
    for links, status in (([f"{url}/dead.tar"], 1), ([f"{url}/dead.tar", f"{url}/teachers.tar"], 0)):
        words = [f"--url={link}" for link in links]
        monkeypatch.setattr(sys, "argv", ["fetch", "resnet8", "--save", str(save), *words])
        assert fetch_teachers.main() == status
        assert "HTTP Error 404" in (said := capsys.readouterr().err) and "cifar_teachers.tar" in said
    found = load_file(save / "resnet8_vanilla" / "resnet8.safetensors")
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    monkeypatch.setitem(fetch_teachers.PINS, "resnet8", "0" * 64)
    (save / "resnet8_vanilla" / "resnet8.safetensors").unlink()
    assert fetch_teachers.main() == 1 and "resnet8: its sha256 is" in capsys.readouterr().err
    server.shutdown()


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 0, 0])
    # Each in a bin of its own: gaps 0.1, 0.8, 0.3, 0.4.
    assert calibration_error(probs, labels) == pytest.approx(100 * (0.1 + 0.8 + 0.3 + 0.4) / 4, rel=1e-6)
    assert calibration_error(probs, labels, bins=1) == pytest.approx(100 * abs(0.75 - 0.75), abs=1e-5)


def test_the_fitted_temperature_has_the_least_likelihood_loss_and_keeps_the_accuracy() -> None:
    gen = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 5, generator=gen, dtype=torch.float64)
    labels = torch.multinomial(true.softmax(1), 1, generator=gen)[:, 0]
    logits: Tensor = 3 * true
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    best = score(logits, labels, temperature)
    assert all(score(logits, labels, temperature * f).nll > best.nll for f in (0.98, 1.02))
    assert best.top1 == score(logits, labels).top1
