"""The shipped text configuration that needs no download: ranks, and a run killed between its held-out scores."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import ROOT, start, torchrun, wait

SHORT = (
    "condense.niter=20", "condense.save_every=10", "condense.checkpoint_every=4", "condense.val_every=8",
    "condense.num_premodel=2", "condense.teacher_model_epoch=1", "pretrain.epochs=1", "evaluation.steps=5",
)  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Runs of 20 iterations with the configuration's own optimiser, teachers in common."""

    folder: Path

    def words(self, program: str, save: str, ranks: int = 1) -> list[str | Path]:
        places = (
            f"save_dir={self.folder / save}",
            f"pretrained_dir={self.folder / 'teachers'}",
            f"cache_dir={ROOT / 'dataset' / 'cache'}",
        )
        config = f"--config_path={ROOT / 'config' / 'ipc5' / 'docstrings.yaml'}"
        return [*torchrun(ranks), ROOT / "condense" / f"{program}.py", config, *SHORT, *places]

    def data(self, save: str, name: str) -> torch.Tensor:
        (path,) = (self.folder / save).rglob(f"syn_data_{name}.pth")
        return torch.load(path, weights_only=True)["data"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With one undisturbed run, by one process, in `base`."""
    runs = Runs(tmp_path_factory.mktemp("embedded"))
    wait(start(runs.words("condense_script_text", "base")))
    return runs


def test_one_two_and_three_ranks_learn_the_same_set(runs: Runs) -> None:
    processes = {ranks: start(runs.words("condense_script_text", f"ranks{ranks}", ranks)) for ranks in (2, 3)}
    for ranks, process in processes.items():
        wait(process)
        for name in ("10", "20"):
            difference = runs.data(f"ranks{ranks}", name) - runs.data("base", name)
            assert float(difference.abs().max()) <= 1e-5
    assert float((runs.data("base", "20") - runs.data("base", "0")).abs().max()) > 0.05


def test_run_killed_after_a_held_out_score_goes_on_to_the_same_bits(runs: Runs) -> None:
    process = start(runs.words("condense_script_text", "killed"))
    until = time.monotonic() + 120
    while not list((runs.folder / "killed").rglob("syn_data_best.pth")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    wait(process, None)
    assert "resumed at iteration" in wait(start(runs.words("condense_script_text", "killed"))).err
    for name in ("best", "20"):
        assert torch.equal(runs.data("killed", name), runs.data("base", name))
    assert metrics(runs, "killed") == metrics(runs, "base")


def metrics(runs: Runs, save: str) -> str:
    (path,) = (runs.folder / save).rglob("metrics.jsonl")
    return path.read_text()
