"""The image programs as users start them: ranks, a killed run, mistakes, the table and its pictures."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, start, torchrun, wait

from condense.dry_run_image import dry_run
from condense.image_job import ImageConfig
from config import add_args_from_yaml

CONFIG = {
    "base": str(ROOT / "config" / "ipc10" / "digits.yaml"),
    "network": {"width": 8},
    "pretrain": {"epochs": 1},
    "condense": {
        "ipc": 2, "num_premodel": 2, "teacher_model_epoch": 1, "niter": 24, "num_freqs": 64, "image_budget": 64,
        "save_every": 12, "checkpoint_every": 3, "aug_type": "color_crop_cutout", "refresh": 2,
    },
    "evaluation": {
        "steps": 6, "repeat": 2,
        "rows": ["full", "condensed", "initial", "random", "herding", "condensed_soft", "condensed_plain"],
        "cutmix": 0.5, "architectures": ["mlp"],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """A short configuration over the shipped one, teachers in common."""

    folder: Path

    def words(self, program: str, save: str, *more: str, ranks: int = 1) -> list[str | Path]:
        places = (f"save_dir={self.folder / save}", f"pretrained_dir={self.folder / 'teachers'}")
        config = f"--config_path={self.folder / 'short.yaml'}"
        return [*torchrun(ranks), ROOT / "condense" / f"{program}.py", config, *places, *more]

    def data(self, save: str, name: str) -> torch.Tensor:
        (path,) = (self.folder / save).rglob(f"syn_data_{name}.pth")
        return torch.load(path, weights_only=True)["data"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With one undisturbed run, by one process, in `base`."""
    lab = Lab(tmp_path_factory.mktemp("images"))
    (lab.folder / "short.yaml").write_text(yaml.safe_dump(CONFIG))
    done = wait(start(lab.words("pretrain_script", "base")))
    assert "teacher 1: validation micro-F1" in done.err
    wait(start(lab.words("condense_script", "base")))
    return lab


def test_one_two_and_three_ranks_learn_the_same_images(lab: Lab) -> None:
    processes = {ranks: start(lab.words("condense_script", f"ranks{ranks}", ranks=ranks)) for ranks in (2, 3)}
    for ranks, process in processes.items():
        wait(process)
        for name in ("12", "24"):
            assert float((lab.data(f"ranks{ranks}", name) - lab.data("base", name)).abs().max()) <= 1e-5
    moved = lab.data("base", "24") - lab.data("base", "0")
    assert float(moved.abs().max()) > 0.05
    assert float(lab.data("base", "24").min()) >= 0 and float(lab.data("base", "24").max()) <= 1


def test_killed_run_goes_on_to_the_same_bits(lab: Lab) -> None:
    process = start(lab.words("condense_script", "killed"))
    until = time.monotonic() + 120
    while not list((lab.folder / "killed").rglob("state.pth")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    wait(process, None)
    assert "resumed at iteration" in wait(start(lab.words("condense_script", "killed"))).err
    assert torch.equal(lab.data("killed", "24"), lab.data("base", "24"))
    assert "finished already" in wait(start(lab.words("condense_script", "killed"))).err


def test_kept_real_sides_of_a_finite_set_of_states_change_nothing(lab: Lab) -> None:
    """With one state, keeping its real side for 1 iteration or for 24 is the same run."""
    runs = [("every", "condense.refresh=1"), ("once", "condense.refresh=24")]
    for save, refresh in runs:
        wait(start(lab.words("condense_script", save, refresh, "condense.teacher_states=1")))
    torch.testing.assert_close(lab.data("every", "24"), lab.data("once", "24"), rtol=0, atol=1e-6)


def test_a_learned_set_can_be_loaded_as_a_start(lab: Lab) -> None:
    (path,) = (lab.folder / "base").rglob("syn_data_24.pth")
    shutil.copy(path, lab.folder / "start.pth")
    wait(start(lab.words("condense_script", "loaded", "--init=load", f"--load_path={lab.folder / 'start.pth'}")))
    assert torch.equal(lab.data("loaded", "0"), lab.data("base", "24"))


def test_evaluation_has_a_row_for_every_set_and_architecture_and_shows_the_images(lab: Lab) -> None:
    done = wait(start(lab.words("evaluate_script", "base", ranks=2)))
    (path,) = (lab.folder / "base" / "condense" / "evaluate").rglob("report.json")
    rows = [(row["name"], row["network"]) for row in json.loads(path.read_text())["rows"]]
    names = CONFIG["evaluation"]["rows"]  # type: ignore[index]
    assert rows == [(name, network) for network in ("", "mlp") for name in names]
    assert "accuracy" in done.out and "threshold" not in done.out
    pictures = {picture.name for picture in path.parent.glob("images/*.png")}
    assert pictures == {"images_before.png", "images_after.png"}


def test_classes_in_stages_are_learned_from_what_is_kept(lab: Lab) -> None:
    more = ("continual.stages=2", "continual.orders=2", "continual.rows=[condensed,random]")
    done = wait(start(lab.words("continual_script", "base", *more)))
    assert "5 classes" in done.out and "10 classes" in done.out
    (path,) = (lab.folder / "base" / "condense" / "continual").rglob("report.json")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["condensed", "random"]
    assert [point[0] for point in rows["condensed"]] == [5, 10]


@pytest.mark.parametrize(
    ("more", "part", "status"),
    [
        ("condense.factor=3", "condense.factor: 3 must divide dataset.size: 16", 1),
        ("network.norm_type=batch", "network.norm_type: batch", 1),
        ("condense.aug_type=crop_cutuot", "did you mean 'cutout'?", 2),
        ("evaluation.rows=[tfidf_full]", "a row of text", 2),
    ],
)
def test_mistake_is_one_line(lab: Lab, more: str, part: str, status: int) -> None:
    done = wait(start(lab.words("condense_script", "mistake", more)), status)
    assert part in done.last and "Traceback" not in done.err


SHIPPED = [
    path.relative_to(ROOT / "config").as_posix()
    for path in sorted((ROOT / "config").glob("ipc*/*.yaml"))
    if "reuters" not in path.name and "docstrings" not in path.name
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_dry_runs_without_its_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = add_args_from_yaml(ImageConfig, ROOT / "config" / name, ["dataset.data_dir=/no/data"], ROOT / "condense")
    dry_run(resolved)
    out = capsys.readouterr().out
    assert "rank 0: classes 0, 1" in out and f"{resolved.config.condense.niter} iterations" in out
    assert "digits" in name or "/no/data is absent" in out
