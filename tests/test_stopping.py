"""How programs end early: a signal to the launcher, from the terminal or to one rank; a closed pipe."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest
import torch
from launching import start, wait
from mini_lab import NITER, Lab, make_lab

from config import ConfigError
from utils.run_folder import take_lock
from utils.stopping import StopFlag, Stopped

GOES_ON = "the same command goes on from here"
TWICE = """
import signal
from utils.stopping import ECHO_SECONDS, stop_flag
with stop_flag() as flag:
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
    print("alive", flush=True)
    flag.since -= ECHO_SECONDS
    signal.raise_signal(signal.SIGINT)
    print("still alive", flush=True)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"))


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of a launcher's two ranks."""
    pid = launcher.pid
    ranks = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert len(ranks) == 2
    return ranks


def from_terminal(launcher: subprocess.Popen[str]) -> None:
    for pid in (launcher.pid, *ranks_of(launcher)):
        os.kill(pid, signal.SIGINT)


SENT: dict[str, Callable[[subprocess.Popen[str]], None]] = {
    "SIGTERM to the launcher": lambda launcher: launcher.send_signal(signal.SIGTERM),
    "SIGINT from the terminal": from_terminal,
    "SIGTERM to rank 1": lambda launcher: os.kill(ranks_of(launcher)[1], signal.SIGTERM),
}


@pytest.mark.parametrize("sent", SENT)
def test_ranks_save_their_last_iteration_and_one_says_so(lab: Lab, sent: str) -> None:
    save = sent.replace(" ", "_")
    process = lab.condense(save, ranks=2)
    lab.wait_for_state(save, process)
    SENT[sent](process)
    done = wait(process, 1)  # torchrun's own, whatever its ranks return
    assert done.err.count(f"stopped by {sent.split()[0]}; {GOES_ON}") == 1
    assert 'condense_script_text.py", line' not in done.err  # the traceback is torchrun's
    folder = lab.run_folder(save)
    *_, last = (folder / "metrics.jsonl").read_text().splitlines()
    saved = int(torch.load(folder / "state.pth", weights_only=True)["iteration"])
    assert saved == json.loads(last)["iteration"] < NITER


@pytest.mark.parametrize("sent", ["SIGTERM to the launcher", "SIGTERM to rank 1"])
def test_rank_that_waits_for_another_stops_with_it(lab: Lab, sent: str) -> None:
    save = "waits_" + sent.replace(" ", "_")
    long = ("evaluation.rows=[tfidf_random,full]", "evaluation.repeat=1", "evaluation.steps=1000000")
    process = lab.start("evaluate_script_text", save, *long, ranks=2)
    until = time.monotonic() + 120
    while not list((lab.folder / save).rglob("tfidf_random*.json")):  # rank 0 is done, rank 1 is not
        assert process.poll() is None and time.monotonic() < until, wait(process, None)
        time.sleep(0.05)
    SENT[sent](process)
    done = wait(process, 1)
    assert done.err.count("stopped by SIGTERM") == done.err.count(GOES_ON) == 1
    assert 'evaluate_script_text.py", line' not in done.err
    assert "Unable to shutdown" not in done.err  # as torchrun says when it has to kill a rank


def test_launchers_echo_of_ctrl_c_is_not_a_second_one() -> None:
    done = wait(start([sys.executable, "-c", TWICE]), -signal.SIGINT)
    assert (done.out, done.err) == ("alive\n", "")


def test_programs_end_in_silence_when_nobody_reads_them(lab: Lab) -> None:
    runs = [
        lab.start("pretrain_script_text", "nothing", "--help"),
        *(lab.start(f"{name}_script_text", "nothing", "--dry_run") for name in ("pretrain", "condense", "evaluate")),
    ]
    for process in runs:
        assert process.stdout
        process.stdout.close()
    ends = [wait(process, None) for process in runs]
    assert [done.err for done in ends] == [""] * 4
    assert {done.status for done in ends} <= {0, 128 + signal.SIGPIPE}


def test_a_folder_that_another_fills_is_waited_for_until_a_signal_comes(tmp_path: Path) -> None:
    flag, first = StopFlag(), take_lock(tmp_path / "teachers", None)
    with pytest.raises(ConfigError, match="another process is working on this run"):
        take_lock(tmp_path / "teachers", None)
    Timer(0.2, first.close).start()
    second = take_lock(tmp_path / "teachers", flag)
    assert first.closed and not second.closed
    flag.catch(signal.SIGTERM, None)
    with pytest.raises(Stopped):
        take_lock(tmp_path / "teachers", flag)
    second.close()
