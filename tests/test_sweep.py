"""Sweeps: what a file lists, what runs side by side, what a table and SLURM are told."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from config import ConfigError
from scripts import slots, sweep
from scripts.programs import PROGRAMS
from scripts.slots import Ended, Job, run_jobs, slots_of
from scripts.table import records_of
from utils.stopping import StopFlag, Stopped

SWEEPS = ROOT / "config" / "sweeps"
FEATURES = [path for path in sorted(SWEEPS.glob("*.txt")) if "feature" in path.stem]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Six runs in two blocks, all of which would lie in a folder of the test."""
    file = tmp_path / "six.txt"
    file.write_text(
        f"[experts] distill_feat/buffer.py\n"
        f"experts distill_feat/buffer/digits.yaml experts.seed=0 buffer_path={tmp_path}\n"
        "---\n"
        f"[students] kd/train.py LOG.PREFIX={tmp_path}\n"
        "kd kd/digits/kd.yaml SOLVER.EPOCHS={1,2}\n"
        "same kd/digits/kd.yaml SOLVER.EPOCHS=2\n"
        "all kd/digits/kd.yaml EXPERIMENT.TAG=of_SEEDS SOLVER.EPOCHS=3\n"
    )
    return file


def test_braces_multiply_seeds_multiply_and_every_run_stands_once(listed: Path) -> None:
    runs = sweep.read_sweep(listed, [4, 5], [])
    assert [(run.name, run.seed, run.block) for run in runs] == [
        ("experts", 4, 0),
        ("kd SOLVER.EPOCHS=1", 4, 1), ("kd SOLVER.EPOCHS=2", 4, 1), ("all", 4, 1),
        ("kd SOLVER.EPOCHS=1", 5, 1), ("kd SOLVER.EPOCHS=2", 5, 1),
    ]  # fmt: skip
    assert [run.cfg.SEED for run in runs[1:]] == [4, 4, 4, 5, 5]
    assert all(listed.parent == run.cfg.LOG.PREFIX for run in runs[1:])
    assert runs[3].cfg.EXPERIMENT.TAG == "of_4,5" and runs[2].cfg.SOLVER.EPOCHS == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[words] kd/tran.py\n", r"six.txt:1: 'kd/tran.py' after the brackets: expected one of .*kd/train.py"),
        ("name kd/digits/kd.yaml\n", r"six.txt:1: 'name kd/digits/kd.yaml': expected .* below \[words\]"),
        ("[words] kd/train.py\nname\n", "six.txt:2: 'name': expected a name, a configuration"),
        ("[words] kd/train.py\nname kd/digits/kd.yaml SOLVER.EPOCH=1\n", "SOLVER.EPOCH"),
        ("[words] kd/train.py\nname kd/digits/none.yaml\n", "none.yaml"),
    ],
)
def test_a_wrong_line_is_said(listed: Path, text: str, said: str) -> None:
    listed.write_text(text)
    with pytest.raises(ConfigError, match=said):
        sweep.read_sweep(listed, [0], [])


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.txt")), ids=lambda path: path.stem)
def test_shipped_sweeps_resolve(path: Path) -> None:
    runs = sweep.read_sweep(path, [0, 1], [])
    assert len(runs) > 2 and all(run.folder.is_absolute() for run in runs)


@pytest.mark.parametrize("path", FEATURES, ids=lambda path: path.stem)
def test_every_trajectory_has_its_experts_above(path: Path) -> None:
    runs = sweep.read_sweep(path, [0], [])
    experts = [run for run in runs if run.script.endswith("buffer.py")]
    taught = [run.cfg for run in runs if run.script.endswith(("mtt.py", "datm.py"))]
    assert experts and taught
    for cfg in taught:
        assert any(
            (cfg.dataset.dataset, cfg.zca, cfg.network.width) == (e.cfg.dataset.dataset, e.cfg.zca, e.cfg.network.width)
            and e.folder.is_relative_to(cfg.buffer_path)
            for e in experts
        ), cfg


def test_every_program_of_the_table_is_a_file() -> None:
    assert all((ROOT / script).is_file() for script in PROGRAMS)


def test_students_of_one_teacher_share_a_process_whatever_is_finished(listed: Path) -> None:
    runs = sweep.read_sweep(listed, [0], [])
    before = [[run.name for run in part] for part in sweep.parts_of(runs, 2)]
    assert before == [["experts"], ["kd SOLVER.EPOCHS=1", "kd SOLVER.EPOCHS=2"], ["all"]]
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "result.json").write_text('{"top1": 50.0}')
    assert [[run.name for run in part] for part in sweep.parts_of(runs, 2)] == before
    table = sweep.sweep_table(runs)
    assert table.header == ("run", "from", "finished", "top-1, last")
    assert [row[2:] for row in table.rows] == [("0/1", "-"), ("1/1", "50.00"), ("0/1", "-"), ("0/1", "-")]


def test_slots_run_side_by_side_and_a_crash_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each of two waits for the other's file: one after another neither would end.
    meet = "import pathlib,sys,time\nown,other=map(pathlib.Path,sys.argv[1:])\nown.touch()\n"
    meet += "for _ in range(3000): other.exists() or time.sleep(0.01)\nother.exists() or sys.exit('alone')\n"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        Job("one", ("-c", meet, a, b), tmp_path / "logs" / "one.log"),
        Job("two", ("-c", meet, b, a), tmp_path / "logs" / "two.log"),
        Job("bad", ("-c", "raise SystemExit('no room')"), tmp_path / "logs" / "bad.log"),
        Job("dumb", ("-c", "import os; os.kill(os.getpid(), 9)"), tmp_path / "logs" / "dumb.log"),
        Job("slot", ("-c", "import os; print(os.environ['SLOT'], 'RANK' in os.environ)"), tmp_path / "slot.log"),
    ]
    found: list[Ended] = []
    monkeypatch.setenv("RANK", "3")
    run_jobs(jobs, [{"SLOT": "first"}, {"SLOT": "second"}], StopFlag(), found.append)
    assert {one.job.name: one.died_of for one in found} == {
        "one": "", "two": "", "bad": "exit status 1: no room", "dumb": "exit status -9: without a word", "slot": "",
    }  # fmt: skip
    assert (tmp_path / "slot.log").read_text().splitlines()[-1] in ("first False", "second False")


def test_last_words_are_a_rank_s_own_and_not_its_launcher_s(tmp_path: Path) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text("import sys\nsys.exit('lr: -1 is not above 0')\n")
    words = ("-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2", str(crash))
    found: list[Ended] = []
    run_jobs([Job("two", words, tmp_path / "two.log")], [{}], StopFlag(), found.append)
    assert "ChildFailedError" in (tmp_path / "two.log").read_text()
    assert found[0].died_of == "exit status 1: lr: -1 is not above 0"


def test_what_is_below_a_line_waits_for_all_above(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, calls = sweep.parts_of(sweep.read_sweep(listed, [0], []), 1), list[list[Job]]()
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, *_: calls.append(jobs))
    sweep.sweep(parts, ["debug=true"], 2, 1, listed.parent)
    assert [[job.name for job in jobs] for jobs in calls] == [
        ["experts, seed 0"], ["kd SOLVER.EPOCHS=1, seed 0", "kd SOLVER.EPOCHS=2, seed 0", "all, seed 0"]
    ]  # fmt: skip
    words = calls[1][0].words
    assert words[:2] == ("-m", "torch.distributed.run") and words[-1] == "debug=true" and "--nproc_per_node=2" in words


def test_two_runs_of_one_name_are_refused(listed: Path) -> None:
    listed.write_text(
        "[a] kd/train.py\nkd kd/digits/kd.yaml\n[b] kd/train.py  # too\nkd kd/digits/kd.yaml SOLVER.EPOCHS=1\n"
    )
    with pytest.raises(ConfigError, match="six.txt:4: 'kd': another run has this name"):
        sweep.read_sweep(listed, [0], [])


def test_a_stop_signal_is_passed_on_and_nothing_more_is_started(tmp_path: Path) -> None:
    log = tmp_path / "first.log"
    sleep = "import signal,sys,time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nprint('on', flush=True)\n"
    jobs = [Job("first", ("-c", sleep + "time.sleep(60)"), log), Job("next", ("-c", ""), tmp_path / "next.log")]
    found: list[Ended] = []

    class Watch(StopFlag):
        @property
        def number(self) -> int:  # the signal comes when the first job is on
            return 15 if log.exists() and log.read_text().endswith("on\n") else 0

        @number.setter
        def number(self, value: int) -> None: ...

    with pytest.raises(Stopped):
        run_jobs(jobs, [{}], Watch(), found.append)
    assert [(one.job.name, one.status) for one in found] == [("first", 143)]
    assert not (tmp_path / "next.log").exists()


def test_a_gpu_has_one_run_and_too_many_slots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(slots.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots_of(None, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert slots_of(None, 1) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    with pytest.raises(ConfigError, match="--slots: 3 of --ranks: 1 take 3 GPUs, and 2 are visible"):
        slots_of(3, 1)


SBATCH = """#!{python}
import json, os, sys
with open("calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
print(sum(1 for _ in open("calls")))
"""


def command(place: Path, name: str, text: str) -> None:
    (place / name).write_text(text)
    (place / name).chmod(stat.S_IRWXU)


def test_numbers_are_kept_once_every_run_has_ended(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, records = sweep.read_sweep(listed, [0], [])[1:], tmp_path / "room" / "results.jsonl"
    records.parent.mkdir()
    written: list[bool] = []

    def check(root: Path, write: bool) -> list[str]:
        assert root == ROOT
        written.append(write)
        return []

    monkeypatch.setattr(sweep, "check", check)
    for number, run in enumerate(runs):
        assert not records.exists()
        run.folder.mkdir(parents=True)
        (run.folder / "result.json").write_text(json.dumps({"top1": number}))
        assert sweep.summary(runs, [runs], tmp_path / "logs", records) == (number + 1 < len(runs))
    assert [(r.run, r.values) for r in sorted(records_of(records), key=lambda r: r.values["top1"])] == [
        ("/".join(run.folder.parts[-4:]), {"top1": [number]}) for number, run in enumerate(runs)
    ]
    assert written == [True]


def test_slurm_gets_an_array_a_block_and_the_table_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(tmp_path, "sbatch", SBATCH.format(python=sys.executable))
    file = tmp_path / "two.txt"
    tiny = f"buffer_path={tmp_path}/e experts.num_experts=1 experts.train_epochs=2 network.width=4"
    file.write_text(
        f"[experts] distill_feat/buffer.py\nexperts distill_feat/buffer/digits.yaml {tiny}\n---\n"
        f"[crash] kd/train.py\nbad kd/digits/kd.yaml DISTILLER.TEACHERS={tmp_path}/none LOG.PREFIX={tmp_path}/kd\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    given = ["--logs", "logs", "--slots=2"]
    monkeypatch.setattr(sys, "argv", ["", str(file), "--sbatch", f"{ROOT}/scripts/./slurm.sbatch", *given])
    assert sweep.main() == 0
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    of_slurm = [[word for word in call if word.startswith(("--parsable", "--array"))] for call in calls]
    assert of_slurm == [["--parsable", "--array=0%2"], ["--parsable", "--array=1%2"], ["--parsable"]]
    assert ["--dependency=afterany:1" in calls[1], "--dependency=afterany:2" in calls[2]] == [True, True]
    ours = [call[call.index(sys.executable) :] for call in calls]
    assert ours[0] == ours[1] == [sys.executable, f"{ROOT}/scripts/sweep.py", str(file), *given]
    assert ours[2] == [*ours[0], "--summary"]

    words, env = ["bash", f"{ROOT}/scripts/slurm.sbatch", *ours[0]], os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(words, env=env, check=True)
    monkeypatch.setattr(sys, "argv", [*ours[1][1:], "--task", "1"])
    assert sweep.main() == 1
    monkeypatch.setattr(sys, "argv", ours[2][1:])
    capsys.readouterr()
    assert sweep.main() == 1
    said = capsys.readouterr()
    assert "NOT FINISHED  bad, seed 0: " in said.err and "no teacher" in said.err and "1/1" in said.out


def test_a_job_of_slurm_that_saved_and_left_is_put_back(tmp_path: Path) -> None:
    command(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/put_back\n')
    run = "import signal,sys,time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    run += f"open('{tmp_path}/on','w').close()\ntime.sleep(60)"
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "71"}
    job = subprocess.Popen(["bash", ROOT / "scripts" / "slurm.sbatch", sys.executable, "-c", run], env=env)
    while not (tmp_path / "on").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.terminate()
    assert job.wait(20) == 143
    assert (tmp_path / "put_back").read_text() == "requeue 71\n"
