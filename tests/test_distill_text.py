"""The text program: from a command to a small model, resumed, refused, and on real data."""

import json
import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT

from config import ConfigError, add_args_from_yaml
from kd import distill_text, text_lab, text_report
from kd.distilltool import expose_attentions
from kd.methods.fidelity import linear_cka
from kd.text_config import DistillTextConfig, run_folder
from kd.text_lab import open_lab
from utils.corpus import Corpus
from utils.ddp import process_group
from utils.report import gain, spread
from utils.stopping import StopFlag, Stopped
from utils.utils_text import load_corpus

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # within pytest's own process
CONFIGS = ROOT / "config" / "kd" / "text"
SHORT = {
    "base": str(CONFIGS / "docstrings.yaml"),
    "max_length": 12,
    "vocab_size": 600,
    "teacher": {"layers": 3, "epochs": 1, "batch_size": 64},
    "student": {"copied_layers": [0, 2], "documents": 96, "lr": [1e-3], "epochs": 3, "seeds": [0]},
    "distill": {
        "intermediate_matches": [
            {"layer_T": 3, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0},
            {"layer_T": 2, "layer_S": 1, "feature": "attention", "loss": "attention_ce", "weight": 1.0},
        ]
    },
}


def few_documents(*given: Any) -> Corpus:
    """Some of every class, for speed."""
    whole = load_corpus(*given)
    train, test = whole.train, whole.test
    return replace(whole, train=train.select(range(0, len(train), -(-len(train) // 400))),
                   val=test.select(range(0, len(test), 20)), test=test.select(range(10, len(test), 20)))  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """A short configuration over the shipped one; every save has results of its own, the teacher is everybody's."""

    folder: Path

    def words(self, save: str, *more: str) -> list[str]:
        places = (f"save_dir={self.folder / save}", f"pretrained_dir={self.folder / 'pretrained'}")
        return [
            f"--config_path={self.folder / 'short.yaml'}",
            f"cache_dir={ROOT / 'dataset' / 'cache'}",
            *places,
            *more,
        ]

    def main(self, save: str, *more: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["distill_text.py", *self.words(save, *more)])
            patch.setattr(text_report, "ROUNDS", 2)
            patch.setattr(text_lab, "load_corpus", few_documents)
            return distill_text.main()

    def only(self, save: str) -> Path:
        (folder,) = (self.folder / save / "docstrings").iterdir()
        return folder

    def config(self, save: str, *more: str) -> DistillTextConfig:
        overrides = self.words(save, *more)[1:]
        return add_args_from_yaml(DistillTextConfig, self.folder / "short.yaml", overrides, ROOT).config


def result(folder: Path) -> dict[str, Any]:
    """Without times."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    del found["documents_per_second"]
    for row in (found["teacher"], *(row for rows in found["students"].values() for row in rows)):
        del row["seconds"]
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With an undisturbed run in `whole`."""
    lab = Lab(tmp_path_factory.mktemp("text"))
    (lab.folder / "short.yaml").write_text(yaml.safe_dump(SHORT))
    assert lab.main("whole") == 0
    return lab


def test_a_run_compares_teacher_and_students_and_leaves_a_model_for_transformers(lab: Lab) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = lab.only("whole")
    found = result(folder)
    assert list(found["students"]) == ["alone", "copied", "distilled_drawn", "distilled"]
    assert found["parameters"]["student"] < found["parameters"]["teacher"]
    report = (folder / "report.md").read_text()
    for text in ("micro-F1", "macro-F1", "student distilled", "documents per second", "over alone"):
        assert text in report
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student").eval()
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]["student"]
    assert model.config.num_hidden_layers == 2 and model.config.id2label[0] == "numpy.ma"
    words = AutoTokenizer.from_pretrained(folder / "student")(["an array of random samples"], return_tensors="pt")
    assert model(**words).logits.shape == (1, 20)


def test_the_terms_of_the_toolkit_are_logged_at_every_step(lab: Lab) -> None:
    (arm,) = lab.only("whole").glob("students/distilled_lr*")
    lines = [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 3 * 3 + 1))
    terms = {"bce logits, T 2", "losses", "hidden_mse hidden 3>2", "attention_ce attention 2>1"}
    assert terms < lines[0].keys()
    assert lines[0]["total"] == pytest.approx(sum(lines[0][term] for term in terms))
    (alone,) = lab.only("whole").glob("students/alone_lr*")
    assert json.loads((alone / "metrics.jsonl").read_text().splitlines()[0]).keys() == {"step", "losses", "total", "lr"}


def test_every_student_is_compared_to_the_teacher(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cfg = result(lab.only("whole")), lab.config("whole")
    for (row,) in found["students"].values():
        assert {"agreement", "kl_to_teacher", "js_to_teacher", "cka"} <= row.keys()
    (row,), folder = found["students"]["distilled"], lab.only("whole") / "students"
    (weights,) = folder.glob("distilled_lr*/model.safetensors")
    monkeypatch.setattr(text_lab, "load_corpus", few_documents)
    with process_group(torch.device("cpu")) as world, torch.no_grad():
        text = open_lab(cfg, world, StopFlag())
        x = text.parts[2].input(torch.arange(len(text.parts[2])), world.device)
        models = text.loaded(cfg.teacher, text.teacher()[0]), text.loaded(cfg.student, weights)
        rows = [model.bert(x.tokens, attention_mask=x.mask).pooler_output for model in models]
        said = [model.classifier(pooled).double() for model, pooled in zip(models, rows, strict=True)]
    teacher, student = (torch.distributions.Bernoulli(logits=logits) for logits in said)
    assert row["agreement"] == pytest.approx(100 * ((said[0] > 0) == (said[1] > 0)).double().mean().item())
    kl = torch.distributions.kl_divergence(teacher, student).mean().item()
    assert row["kl_to_teacher"] == pytest.approx(kl, rel=1e-4) and 0 < row["js_to_teacher"] < kl
    assert row["cka"] == pytest.approx(100 * linear_cka(*rows), rel=1e-4)


def test_students_of_an_earlier_version_have_a_dash_for_what_it_did_not_measure(lab: Lab) -> None:
    shutil.copytree(lab.folder / "whole", lab.folder / "earlier")
    folder = lab.only("earlier")
    (folder / "result.json").unlink()
    (path,) = folder.glob("students/copied_lr*/result.json")
    kept = {name: value for name, value in json.loads(path.read_text()).items() if "teacher" not in name}
    path.write_text(json.dumps({name: value for name, value in kept.items() if name not in ("agreement", "cka")}))
    assert lab.main("earlier") == 0
    lines = (folder / "report.md").read_text().splitlines()
    (dashed,) = (line for line in lines if line.endswith("| - | - | - |"))
    assert dashed.startswith("| student alone, from copied layers ")


def test_a_finished_run_and_a_kept_teacher_train_nothing_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lab.TextLab, "train", None)
    assert lab.main("whole") == 0
    (lab.only("whole") / "result.json").unlink()
    before = (lab.only("whole") / "report.md").stat().st_mtime_ns
    assert lab.main("whole") == 0
    assert (lab.only("whole") / "report.md").stat().st_mtime_ns > before


def test_a_stopped_run_goes_on_to_the_same_numbers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    checks, original = [0], text_lab.TextLab.train

    def check(flag: StopFlag) -> None:
        checks[0] += 1
        if checks[0] == 6:  # one before each training, one after each of its 3 epochs: within the second student
            raise Stopped(15)

    trained: list[str] = []

    def train(self: Any, fit: Any, *rest: Any) -> Any:
        trained.append(fit.arm)
        return original(self, fit, *rest)

    monkeypatch.setattr(text_lab.TextLab, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "check", check)
        assert lab.main("stopped") == 128 + 15
    assert not (lab.only("stopped") / "result.json").exists()
    (left,) = lab.only("stopped").glob("students/copied_lr*/saves/resume.pt")
    assert lab.main("stopped") == 0
    assert trained == ["alone", "copied", "copied", "distilled_drawn", "distilled"] and not left.exists()
    assert result(lab.only("stopped")) == result(lab.only("whole"))


def test_the_seed_decides_documents_and_weights_for_all_arms_alike(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = lab.config("unused")
    monkeypatch.setattr(text_lab, "load_corpus", few_documents)
    with process_group(torch.device("cpu")) as world:
        text = open_lab(cfg, world, StopFlag())
        fits = {(arm, seed): text_lab.Fit(Path(), arm, 1e-3, seed) for arm in cfg.student.arms for seed in (0, 1)}
        first = {key: next(iter(text.loader(fit, cfg.student))) for key, fit in fits.items()}
        weights = [text.fresh(cfg.student, seed).bert.pooler.dense.weight for seed in (0, 0, 1)]
    for arm in cfg.student.arms:
        assert first[arm, 0]["input_ids"].equal(first["alone", 0]["input_ids"])
    assert not first["alone", 0]["labels"].equal(first["alone", 1]["labels"])
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert first["alone", 0]["input_ids"].shape == (32, 12)


@pytest.mark.parametrize(("word", "said"), [
    ("student.copied_layers=[0]", "copied_layers: [0], but the student has layers: 2"),
    ("student.copied_layers=[0,7]", "copied_layers: 7, but the teacher has layers 0 to 2"),
    ("student.width=mini", "student.width: mini, but layers of a tiny teacher are copied"),
    ("student.seeds=[]", "seeds: []: give at least one"),
    ("student.lr=[0]", "lr: [0.0]: give at least one, above 0"),
    ("distill.cache_teacher=index", "distill.cache_teacher: 'index', but batches"),
    ("distill.kd_loss_type=cee", "'cee' is not a logit loss"),
    ("distill.kd_loss_type=ce", "several labels: set bce or mse"),
    ("distill.intermediate_matches=[{layer_T: 4, layer_S: 2, feature: hidden, loss: cos, weight: 1}]",
     "layer_T: 4, but hidden has entries 0 to 3"),
    ("distill.intermediate_matches=[{layer_T: 2, layer_S: 2, feature: attention, loss: attention_ce, weight: 1}]",
     "layer_S: 2, but attention has entries 0 to 1"),
    ("dataset.dataset=ag_news", "dataset.data_dir: required for dataset ag_news"),
])  # fmt: skip
def test_mistakes_are_one_line(word: str, said: str, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main("mistaken", word) in (1, 2)
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_dry_run_trains_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main("dry", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "students: 4 arms x 1 learning rates x 1 seeds" in out and str(run_folder(lab.config("dry"))) in out
    assert not (lab.folder / "dry").exists()


def test_gains_are_paired_by_seed() -> None:
    assert gain([3.0, 5.0, 9.0], [1.0, 4.0, 6.0]) == "+2.00 ± 0.58"  # differences 2, 1, 3
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00" and spread([4.0]) == "4.00"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_resolve(path: Path) -> None:
    cfg = add_args_from_yaml(DistillTextConfig, path, (), ROOT).config
    assert cfg.student.layers == 2 and cfg.attention == "log"
    assert (cfg.distill.kd_loss_type == "bce") == cfg.dataset.is_multilabel
    with pytest.raises(ConfigError, match="unknown key"):
        add_args_from_yaml(DistillTextConfig, path, ["student.layrs=2"], ROOT)


@pytest.mark.parametrize(("name", "nclass"), [("ag_news", 4), ("sst2", 2), ("reuters", 90)])
def test_real_documents_are_distilled(
    name: str, nclass: int, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lab, "load_corpus", few_documents)
    places = (f"dataset.data_dir={shared_data / name}", f"pretrained_dir={tmp_path}")
    words = (*places, "vocab_size=600", "max_length=12", "student.documents=32", "student.epochs=1")
    cfg = add_args_from_yaml(DistillTextConfig, CONFIGS / f"{name}.yaml", words, ROOT).config
    with process_group(torch.device("cpu")) as world:
        text = open_lab(cfg, world, StopFlag())
        fit = text_lab.Fit(tmp_path / "fit", "distilled", 1e-3, 0)
        teacher = text.fresh(cfg.teacher, 0)
        expose_attentions(teacher)
        text.train(fit, cfg.student, teacher)
        batch = next(iter(text.loader(fit, cfg.student)))
        itself = text.scores(teacher, text.said(teacher, text.parts[2]))
    assert (itself["agreement"], itself["kl_to_teacher"], itself["cka"]) == pytest.approx((100, 0, 100))
    line = json.loads((fit.folder / "metrics.jsonl").read_text())
    assert len(line) == 2 + 5 + 3 and all(map(math.isfinite, line.values()))  # logits, labels, matches; step, total, lr
    assert batch["labels"].shape == ((32, nclass) if name == "reuters" else (32,))
