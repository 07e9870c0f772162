"""The comparison of condensation methods as users start it: all rows, equal bytes, a crash, a second call."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, Ended, start, wait

from condenser.robust_scores import augmentation_robust_score, label_robust_score
from config import add_args_from_yaml
from scripts.compare_plan import CompareConfig, lines_of

CONFIG = ROOT / "config"
SMALL = {"dataset": {"dataset": "digits", "nclass": 10, "size": 8}, "network": {"width": 8, "depth": 2}}
SET = {"niter": 2, "save_every": 2, "checkpoint_every": 2}
FIT = {"steps": 4, "batch_size": 32, "probe_every": 4, "tta": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "ncfm": {
        "base": str(CONFIG / "ipc10" / "digits.yaml"), "pretrain": {"epochs": 1},
        "condense": SET | {"num_premodel": 1, "teacher_model_epoch": 1, "num_freqs": 8},
    },
    "buffer": {
        "base": str(CONFIG / "distill_feat" / "buffer" / "digits.yaml"),
        "experts": {"num_experts": 1, "train_epochs": 3, "batch_train": 128},
    },
    "dc": {
        "base": str(CONFIG / "distill_feat" / "dc" / "digits_ipc10.yaml"), "pretrain": {"epochs": 1},
        "condense": SET | {"outer_loop": 1, "inner_loop": 1}, "evaluation": FIT,
    },
    "datm": {
        "base": str(CONFIG / "distill_feat" / "datm" / "digits_ipc10.yaml"), "evaluation": FIT,
        "condense": SET | {
            "syn_steps": 3, "batch_syn": 8, "expert_epochs": 1, "max_start_epoch": 2, "current_max_start_epoch": 1,
            "expansion_end_epoch": 2,
        },
    },
}  # fmt: skip
# Images a class at a scale of 4 images of 64 numbers: feature labels of 8 numbers, soft labels of 10.
ROWS = {"random": [4], "herding": [4], "k-center": [4], "NCFM": [4], "DC+F": [4, 3], "DATM": [4, 3]}
NUMBERS = {"random": 64, "herding": 64, "k-center": 64, "NCFM": 64, "DC+F": 64 + 8, "DATM": 64 + 10}  # an image


@dataclass(frozen=True)
class Lab:
    """Manifests over short configurations, all outputs in one folder."""

    folder: Path

    def method(self, program: str, *overrides: str) -> dict[str, Any]:
        return {"program": program, "configs": {4: f"{self.folder / program}.yaml"}, "overrides": list(overrides)}

    def manifest(self, name: str = "all", **changes: Any) -> Path:
        sets = {"save_dir": f"{self.folder / 'results'}", "pretrained_dir": f"{self.folder / 'teachers'}"}
        experts = {"buffer_path": f"{self.folder / 'experts'}"}
        places = {"ncfm": sets, "dc": sets, "datm": sets | experts, "buffer": experts}
        for program, config in CONFIGS.items():
            (self.folder / f"{program}.yaml").write_text(yaml.safe_dump(config | SMALL | places[program]))
        methods = {
            "NCFM": self.method("ncfm"), "DC+F": self.method("dc", "feature.form=channel"), "DATM": self.method("datm"),
        }  # fmt: skip
        path = self.folder / f"compare_{name}.yaml"
        manifest = {
            "judge": f"{self.folder / 'ncfm.yaml'}", "scales": [4], "seeds": [0], "methods": methods,
            "students": {"lr": 2e-3, "repeat": 2, "aug_type": "crop"} | FIT,
            "prepare": [{"script": "distill_feat/buffer.py", "config": f"{self.folder / 'buffer.yaml'}"}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(manifest | changes))
        return path

    def compare(self, manifest: Path, status: int = 0) -> Ended:
        return wait(start([sys.executable, "-m", "scripts.compare_condensation", "--config_path", manifest]), status)

    def written(self) -> dict[Path, float]:
        """When every set, teacher, expert and student was written."""
        files = [file for kind in ("pth", "safetensors") for file in self.folder.rglob(f"*.{kind}")]
        return {file: file.stat().st_mtime_ns for file in [*files, *self.folder.rglob("students/*.json")]}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("compare"))
    lab.compare(lab.manifest())
    return lab


@pytest.fixture
def run(lab: Lab) -> Path:
    (folder,) = {path.parent for path in lab.folder.glob("results/compare/digits/scales4/full_*/result.json")}
    return folder


def students(run: Path, row: str) -> float:
    files = [*run.glob(f"students/{row}_seed0_*.json")]
    assert len(files) == 2
    return sum(json.loads(file.read_text())["accuracy"] for file in files) / 2


def test_the_table_has_every_method_with_as_many_images_and_in_as_many_bytes(run: Path) -> None:
    rows = json.loads((run / "result.json").read_text())
    assert set(rows) == {"full"} | {f"{name}_4_{n}" for name, every in ROWS.items() for n in every}
    for name, every in ROWS.items():
        for images in every:
            found = rows[f"{name}_4_{images}"]
            assert found["bytes"] == 4 * 10 * images * NUMBERS[name] and found["images"] == 10 * images
            assert (found["peak"] > 50 and found["iteration_s"] > 0) if name in ("NCFM", "DC+F", "DATM") else True
        fair = max(every) if NUMBERS[name] == 64 else min(every)
        assert fair * NUMBERS[name] <= 4 * 64 < (fair + 1) * NUMBERS[name]
    page = (run / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in ROWS) and "CRASHED" not in page


def test_scores_compare_with_the_random_images_of_the_scale(run: Path) -> None:
    rows, random = json.loads((run / "result.json").read_text()), "random_4_4"
    for row, hard in (("NCFM_4_4", "NCFM_4_4"), ("DATM_4_3", "DATM_4_3_hard")):
        full, learned = students(run, "full"), students(run, hard)
        label = label_robust_score(full, learned, students(run, f"{row}_soft"), students(run, f"{random}_soft"))
        plain = students(run, f"{row}_plain"), students(run, f"{random}_plain")
        assert rows[row]["label_robust"] == pytest.approx(label)
        augmented = augmentation_robust_score(students(run, row), students(run, random), *plain)
        assert rows[row]["augmentation_robust"] == pytest.approx(augmented)
    assert rows[random]["augmentation_robust"] == pytest.approx(augmentation_robust_score(50, 50, 50, 50))


def test_a_crash_is_a_marked_row_and_exit_status_1_and_trains_nothing_that_is_there(lab: Lab, run: Path) -> None:
    before = lab.written()
    broken = lab.method("dc", "condense.init=load", "condense.load_path=absent.pth")
    manifest = lab.manifest("broken", methods={"NCFM": lab.method("ncfm"), "Broken": broken}, prepare=[])
    found = lab.compare(manifest, status=1)
    assert "CRASHED Broken_4_4_seed0: exit status 1: " in found.err and "absent.pth" in found.last
    (row,) = [line.split() for line in found.out.splitlines() if "Broken" in line and "CRASHED" in line][:1]
    assert row[:2] == ["4", "Broken"] and "NCFM" in found.out
    after = {path: time for path, time in lab.written().items() if path in before}
    assert after == before
    (other,) = {path.parent for path in run.parent.glob("*/report.json")} - {run}
    assert not (other / "result.json").exists()


def test_a_second_call_trains_nothing_and_shows_the_table(lab: Lab, run: Path) -> None:
    before = lab.written()
    found = lab.compare(lab.manifest())
    assert "finished already" in found.err and "DATM" in found.out and lab.written() == before


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG / "compare").glob("*.yaml")))
@pytest.mark.parametrize("quick", ["false", "true"])
def test_shipped_manifests_compare_within_the_bytes_of_their_scales(name: str, quick: str) -> None:
    m = add_args_from_yaml(CompareConfig, CONFIG / "compare" / f"{name}.yaml", (f"quick={quick}",), ROOT / "scripts")
    lines = lines_of(m.config)
    methods = {line.method for line in lines}
    features = {name for name in methods if name.endswith("+F")}
    assert methods - features >= {"full", "random", "herding", "k-center", "NCFM", "DC", "MTT"}
    assert bool(features) == (quick == "false")
    for line in lines:
        assert bool(line.feature) == (line.method in features)
        assert len(line.runs) in (0, 1 if quick == "true" else 3)
        assert line.images <= line.scale and (line.equal == "bytes") == (line.images < line.scale)


def test_feature_labels_of_one_number_a_channel_leave_9_of_10_and_48_of_50_images() -> None:
    m = add_args_from_yaml(CompareConfig, CONFIG / "compare" / "cifar10.yaml", (), ROOT / "scripts").config
    fair = {line.scale: line.images for line in lines_of(m) if line.method == "DC+F" and line.equal == "bytes"}
    assert fair == {10: 9, 50: 48}
