"""MTT and DATM as users start them: experts to table, ranks, ends of every sort, whitening, chains, mistakes."""

import json
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, start, torchrun, wait
from torch import Tensor

from condenser.export import load_export
from condenser.synthetic_set import SyntheticSet, load_synthetic
from distill_feat import buffer, datm, mtt
from utils.checkpoint import load_pth

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # within pytest's own process
FILES = ROOT / "config" / "distill_feat"
NITER = 8
SMALL = {"dataset": {"dataset": "digits", "nclass": 10, "size": 8}, "network": {"width": 16, "depth": 2}}
EXPERTS = {"num_experts": 2, "train_epochs": 6, "batch_train": 32, "lr_teacher": 0.05}
SET: dict[str, Any] = SMALL | {
    "base": str(FILES / "mtt" / "base.yaml"),
    "pretrain": {"lr": 0.02, "batch_size": 64, "epochs": 1},
    "condense": {
        "ipc": 1, "niter": NITER, "syn_steps": 5, "batch_syn": 6, "expert_epochs": 1, "max_start_epoch": 4,
        "lr_img": 100, "lr_lr": 1e-4, "lr_teacher": 0.1, "checkpoint_every": 2, "save_every": 4, "val_every": 0,
        "aug_type": "color/crop/cutout/scale/rotate",
    },
    "evaluation": {
        "steps": 6, "repeat": 1, "probe_every": 3, "tta_mode": "shift", "batch_size": 64, "rows": ["distilled"],
    },
}  # fmt: skip
GROWING = {
    "init": "correct", "soft_labels": True, "lr_y": 2.0, "threshold": 1.5, "current_max_start_epoch": 2,
    "expansion_end_epoch": 6,
}  # fmt: skip
F = ("--lbd=0.1", "--feat-lbd=0.01", "--pooling=avg", "--n_feat=2", "--use_feature=random", "feature.lbd_contrast=0.01")
ROWS = "[distilled,distilled_feature,start,start_feature,random]"
CONFIGS = {
    "buffer": SMALL | {"base": str(FILES / "buffer" / "digits.yaml"), "experts": EXPERTS},
    "mtt": SET,
    "datm": SET | {"condense": SET["condense"] | GROWING},
}  # fmt: skip
PROGRAMS: dict[str, ModuleType] = {"buffer": buffer, "mtt": mtt, "datm": datm}


@dataclass(frozen=True)
class Lab:
    """Short configurations over the shipped ones, experts and starts in common."""

    folder: Path

    def words(self, program: str, save: str, *more: str) -> list[str]:
        places = [f"--config_path={self.folder / program}.yaml", f"--buffer_path={self.folder / 'experts'}"]
        if program != "buffer":
            places += [f"save_dir={self.folder / save}", f"pretrained_dir={self.folder / 'starts'}"]
        return [*places, *more]

    def start(self, program: str, save: str, *more: str, ranks: int = 1, module: bool = False) -> subprocess.Popen[str]:
        name = ["-m", f"distill_feat.{program}"] if module else [f"distill_feat/{program}.py"]
        return start([*torchrun(ranks), *name, *self.words(program, save, *more)])

    def within(self, program: str, save: str, *more: str) -> int:
        """Exit status of the program within this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{program}.py", *self.words(program, save, *more)])
            return int(PROGRAMS[program].main())

    def path(self, save: str, name: str) -> Path:
        (path,) = (self.folder / save).rglob(name)
        return path

    def learned(self, save: str, name: str = "best") -> SyntheticSet:
        return load_synthetic(self.path(save, f"syn_data_{name}.pth"))

    def state(self, save: str) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = load_pth(self.path(save, "state.pth"))["rows"]
        return rows

    def sizes(self, save: str) -> dict[str, tuple[int, float, int]]:
        """Of every row: images, image-equivalents and bytes of a class."""
        lines = json.loads(self.path(save, "report.json").read_text())["table"].splitlines()[3:]
        cells = {line[: line.index("  ")]: line.split()[-4:-1] for line in lines}
        return {name: (int(images), float(equal), int(size)) for name, (images, equal, size) in cells.items()}

    def students(self, save: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.path(save, "report.json").read_text())["students"]
        return found

    def last(self, save: str, row: str) -> float:
        """Accuracy of a row, mean over students."""
        return mean(student["last"] for student in self.students(save) if student["row"] == row)

    def wait_for(self, process: subprocess.Popen[str], save: str, name: str, since: int = 0) -> None:
        """Return as soon as there is such a file, written after `since`."""
        until = time.monotonic() + 120
        while not any(path.stat().st_mtime_ns > since for path in (self.folder / save).rglob(name)):
            assert process.poll() is None and time.monotonic() < until, wait(process, None)
            time.sleep(0.002)


def tensors(found: SyntheticSet) -> list[Tensor]:
    features = [] if found.features is None else [found.features]
    return [found.data, found.targets, *features, torch.tensor(found.meta["lr"])]


def same_bits(one: SyntheticSet, other: SyntheticSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With experts, plain and whitened, and undisturbed runs of MTT without F and of DATM with F."""
    lab = Lab(tmp_path_factory.mktemp("trajectories"))
    for name, config in CONFIGS.items():
        (lab.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert lab.within("buffer", "") == 0
    runs = [lab.start("mtt", "mtt", module=True), lab.start("datm", "datm", *F, f"evaluation.rows={ROWS}")]
    assert lab.within("buffer", "", "--zca") == 0
    for process in runs:
        assert "learned set: " in wait(process).err
    return lab


def test_experts_give_sets_and_tables_by_path_and_as_a_module(lab: Lab) -> None:
    for save, more in (("mtt", set()), ("datm", {"logits", "features"})):
        assert {name for name in lab.state(save) if " " not in name} == {"data", "rate"} | more
        first, last = lab.learned(save, "0"), lab.learned(save)
        assert same_bits(last, lab.learned(save, str(NITER)))
        assert same_bits(last, load_export(lab.path(save, "set.safetensors").parent))
        assert all(not torch.equal(a, b) for a, b in zip(tensors(first), tensors(last), strict=True)) == bool(more)
        assert not torch.equal(first.data, last.data) and first.meta["lr"] == pytest.approx(0.1)
        assert last.meta["lr"] != first.meta["lr"]
        lines = [json.loads(line) for line in lab.path(save, "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == list(range(1, NITER + 1))
        assert lines[-1]["alpha"] == pytest.approx(0.1, rel=0.2) and all(line["match"] > 0 for line in lines)
    assert ROWS[1:-1].split(",") == [student["row"] for student in lab.students("datm")]


def test_soft_labels_and_feature_labels_are_charged(lab: Lab) -> None:
    pixels, soft, labels = 64, 10, 2 * 16  # floats of an image, its soft label, its two channel labels
    found = lab.sizes("datm")
    assert found["learned, no F"] == found["its start, no F"] == (1, round((pixels + soft) / pixels, 2), 296)
    assert found["learned, with F"] == (1, round((pixels + soft + labels) / pixels, 2), 4 * (pixels + soft + labels))
    assert found["random, equal bytes"] == (1, 1.0, 256) and lab.sizes("mtt")["learned, no F"] == (1, 1.0, 256)


def test_the_plan_charges_them_too_and_shares_out_no_classes(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.within("datm", "", *F, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "with soft labels of 10 classes and F of shape (16,) take as many bytes as 1.66 images" in said
    assert "from epoch 0 to 1 growing to 3 on" in said and "classes 0, 1" not in said


def test_a_killed_and_a_stopped_run_go_on_to_the_same_bits(lab: Lab) -> None:
    process = lab.start("datm", "ended", *F)
    lab.wait_for(process, "ended", "state.pth")
    process.kill()
    wait(process, None)
    state = lab.path("ended", "state.pth")
    assert load_pth(state)["iteration"] < NITER
    since, process = state.stat().st_mtime_ns, lab.start("datm", "ended", *F)
    lab.wait_for(process, "ended", "state.pth", since)
    process.send_signal(signal.SIGTERM)
    ended = wait(process, 128 + signal.SIGTERM)
    assert ended.last == "stopped by SIGTERM; the same command goes on from here" and "resumed at" in ended.err
    assert lab.within("datm", "ended", *F) == 0
    whole, found = lab.state("datm"), lab.state("ended")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert same_bits(lab.learned("ended"), lab.learned("datm"))
    lines = [lab.path(save, "metrics.jsonl").read_text() for save in ("ended", "datm")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("starts", [1, pytest.param(2, marks=pytest.mark.slow)])  # share samples, share starts
def test_two_ranks_learn_what_one_learns(lab: Lab, starts: int) -> None:
    more, own = (*F, f"condense.starts={starts}", "--Iteration=4"), f"pretrained_dir={lab.folder / 'starts of ranks'}"
    process = lab.start("datm", f"ranks {starts}", *more, own, ranks=2)
    assert lab.within("datm", f"alone {starts}", *more) == 0
    wait(process)
    for a, b in zip(*(tensors(lab.learned(f"{name} {starts}")) for name in ("ranks", "alone")), strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5


def test_a_whitened_set_comes_with_its_whitening(lab: Lab) -> None:
    assert lab.within("mtt", "white", "--zca", "--lbd=0.1", "evaluation.rows=[distilled,random]") == 0
    found, folder = lab.learned("white"), lab.path("white", "set.safetensors").parent
    first = lab.learned("white", "0")
    assert found.normaliser is not None and first.normaliser is not None and found.normaliser.zca is not None
    seen = found.normaliser(found.data)
    images, labels, features = runpy.run_path(str(folder / "load.py"))["load"]()
    assert torch.equal(images, seen) and labels.tolist() == list(range(10))
    assert found.features is not None and torch.equal(features, found.features)
    again = load_export(folder)
    assert again.normaliser is not None and torch.equal(again.normaliser(again.data), seen)
    for file in folder.parent.rglob("zca.safetensors"):
        assert file.read_bytes() == next((lab.folder / "experts").rglob("zca.safetensors")).read_bytes()
    assert {file.parent.name for file in folder.parent.rglob("zca.safetensors")} == {"export", "distilled_data"}
    real = lab.learned("mtt", "0")  # the same images, not whitened
    torch.testing.assert_close(first.data, real.data, rtol=0, atol=1e-5)
    plain = (found.data - found.normaliser.mean[:, None, None]) / found.normaliser.std[:, None, None]
    assert not torch.allclose(seen, plain, atol=0.1) and float((found.data - first.data).abs().max()) > 1e-3


def test_the_chain_of_sets(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """pre -> distill with F from its images -> on with test-time views, each from the file of the one before."""
    before = lab.path("mtt", "syn_data_best.pth")
    assert lab.within("mtt", "second", f"--init={before}", "--lbd=0.1", "--lr_feat=0.05", "--Iteration=3") == 0
    first, second = lab.learned("second", "0"), lab.learned("second")
    torch.testing.assert_close(first.data, lab.learned("mtt").data, rtol=0, atol=1e-5)
    assert first.features is not None and second.features is not None
    assert float((first.features - second.features).abs().max()) > 0.01
    views = ("--tta", "--tta_mode=hflip5", "evaluation.rows=[start,start_feature]", "--Iteration=0")
    capsys.readouterr()
    assert lab.within("mtt", "third", f"--init={lab.path('second', 'syn_data_best.pth')}", "--lbd=0.1", *views) == 0
    said = capsys.readouterr()
    assert "are of another kind" not in said.err and "views: mean logits of hflip5" in said.out
    third = lab.learned("third")
    assert third.features is not None and torch.equal(third.features, second.features)
    torch.testing.assert_close(third.data, second.data, rtol=0, atol=1e-5)


def test_what_is_generated_before_is_what_a_run_starts_from(lab: Lab, tmp_path: Path) -> None:
    places = (f"pretrained_dir={tmp_path}", "--init=noise", "--lbd=0.1", "--Iteration=1")
    assert lab.within("mtt", "generated", *places, "--generate_pretrained") == 0
    assert not (lab.folder / "generated").exists()
    (path,) = tmp_path.rglob("syn_data_0.pth")
    known, stamp = load_synthetic(path), path.stat().st_mtime_ns
    assert lab.within("mtt", "generated", *places) == 0 and path.stat().st_mtime_ns == stamp
    found = lab.learned("generated", "0")
    assert found.features is not None and known.features is not None
    assert torch.equal(found.features, known.features) and torch.equal(found.targets, known.targets)
    torch.testing.assert_close(found.data, known.data, rtol=0, atol=1e-6)


def test_soft_labels_of_a_loaded_set_stay(lab: Lab) -> None:
    load, known = f"--init={lab.path('datm', 'syn_data_best.pth')}", lab.learned("datm")
    assert float(known.targets.amax(1).max()) < 1
    for program in ("datm", "mtt"):  # learned on, and as they are
        save = f"loaded by {program}"
        assert lab.within(program, save, load, "--Iteration=1") == 0
        torch.testing.assert_close(lab.learned(save, "0").targets, known.targets, rtol=1e-5, atol=1e-7)
        assert torch.equal(lab.learned(save).targets, lab.learned(save, "0").targets) == (program == "mtt")
        assert lab.sizes(save)["learned, no F"] == (1, 1.16, 296)
    assert lab.within("datm", "hard", f"--init={lab.path('mtt', 'syn_data_best.pth')}", "--Iteration=0") == 0
    found = lab.learned("hard").targets  # of expert 0
    assert float(found.amax(1).max()) < 1 and found.argmax(1).eq(torch.arange(10)).float().mean() > 0.5


def test_a_finished_run_says_so_and_one_of_other_experts_is_not_gone_on_with(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.within("mtt", "mtt") == 0
    again = capsys.readouterr()
    assert "finished already" in again.err and "learned, no F" in again.out
    places = (f"--buffer_path={tmp_path / 'experts'}", f"save_dir={tmp_path}")
    for seed, status in ((1, 0), (2, 1)):
        shutil.rmtree(tmp_path / "experts", ignore_errors=True)
        more = ("--num_experts=1", "--train_epochs=4", f"experts.seed={seed}")
        assert lab.within("buffer", "", places[0], *more) == 0
        assert lab.within("mtt", "", *places, "--Iteration=1", f"--num_eval={seed}") == status
    assert "made from other data" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "more", "parts", "status"),
    [
        ("mtt", "--buffer_path /no/such", ["/no/such: holds no expert_", "make them with distill_feat/buffer.py"], 1),
        ("mtt", "condense.syn_step=3", ["condense.syn_step: unknown key; did you mean 'syn_steps'?"], 2),
        ("datm", "--syn_step 3", ["--syn_step: unknown option; did you mean '--syn_steps'?"], 2),
        ("mtt", "--aug_type color/crap", ["'crap' is not one of", "did you mean 'crop'?"], 2),
        ("mtt", "--init /no/such.pth", ["/no/such.pth: no such file"], 1),
        ("mtt", "--init NOT.pth", ["NOT.pth: not a readable file of tensors"], 1),
        ("mtt", "--init SET --ipc 3", ["has 1 images a class", "condense.ipc is 3"], 1),
        ("mtt", "--init SET dataset.size=16", ["experts of another network, with", "head.weight"], 1),
        ("mtt", "--init reall", ["'reall' is not 'real'", "did you mean 'real'?"], 2),
        ("mtt", "--max_start_epoch 7", ["keeps epochs 0 to 6, not 7", "lower max_start_epoch"], 1),
        ("mtt", "--expert_epochs 4", ["keeps epochs 0 to 6, not 7", "lower max_start_epoch or expert_epochs"], 1),
        ("datm", "--min_start_epoch 2", ["min_start_epoch: 2, current_max_start_epoch: 2", "must rise"], 2),
        ("mtt", "network.width=8", ["experts of another network", "check --model and the network"], 1),
        ("mtt", "--model ConvNetD1", ["experts of another network"], 1),
        ("mtt", "network.norm_type=batch", ["network.norm_type: batch", "set instance"], 1),
        ("mtt", "--no_learn_images", ["condense.learn_images: false, and neither", "set it true"], 2),
        ("mtt", "--no_learn_images --lbd 0.1 feature.learn=false", ["neither soft nor feature labels are learned"], 2),
        ("mtt", "--zca dataset.val_fraction=0.2", ["set --zca or --no_zca to fit", "the same validation part"], 1),
        ("datm", "--ipc 300", ["condense.ipc: 300, but a class has", "lower it"], 1),
        ("mtt", "--lr_img=1e30 --Iteration=4", ["the loss is not finite", "the last saved state is kept"], 1),
    ],
)
def test_mistake_is_one_line_with_its_remedy(
    lab: Lab, tmp_path: Path, program: str, more: str, parts: list[str], status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "NOT.pth").write_text("no tensors")
    names = {"SET": str(lab.path("mtt", "syn_data_best.pth")), "NOT.pth": str(tmp_path / "NOT.pth")}
    words = [names.get(word, word) for word in more.split()]
    places = (f"save_dir={tmp_path / 'results'}", f"pretrained_dir={tmp_path / 'starts'}")
    assert lab.within(program, "", *places, *words) == status
    lines = capsys.readouterr().err.splitlines()
    assert any(all(part in line for part in parts) for line in lines), lines
    assert len(lines) <= 4 and "Traceback" not in "".join(lines)
    assert not list((tmp_path / "results").rglob("syn_data_best.pth"))


@pytest.mark.parametrize(("zca", "text"), [("--zca", "made with no ZCA, but this run has ZCA"),
                                           ("--no_zca", "but this run has no ZCA")])  # fmt: skip
def test_experts_that_saw_other_pixels_are_refused(
    lab: Lab, tmp_path: Path, zca: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    white = lab.folder / "experts" / "digits"
    (folder,) = [path for path in white.iterdir() if ("_zca" in path.name) != (zca == "--zca")]
    places = (f"--buffer_path={folder}", f"save_dir={tmp_path}", f"pretrained_dir={tmp_path}")
    assert lab.within("mtt", "", *places, zca) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line and "set --zca or --no_zca to fit" in line and str(folder) in line


def test_a_loaded_set_of_another_whitening_is_seen_through_the_run_s_own(lab: Lab) -> None:
    """Files hold pixels, whatever networks saw."""
    assert (
        lab.within("mtt", "to white", f"--init={lab.path('mtt', 'syn_data_best.pth')}", "--zca", "--Iteration=0") == 0
    )
    found = lab.learned("to white")
    torch.testing.assert_close(found.data, lab.learned("mtt").data, rtol=0, atol=1e-4)
    assert found.normaliser is not None and found.normaliser.zca is not None


def test_a_run_that_learns_labels_only_leaves_the_images(lab: Lab) -> None:
    for program in ("mtt", "datm"):
        save = f"labels by {program}"
        assert lab.within(program, save, "--no_learn_images", "--lbd=0.1", "--Iteration=2") == 0
        first, last = lab.learned(save, "0"), lab.learned(save)
        assert torch.equal(first.data, last.data) and first.features is not None and last.features is not None
        assert not torch.equal(first.features, last.features)
        assert torch.equal(first.targets, last.targets) == (program == "mtt")


def test_the_set_that_is_best_on_validation_is_kept(lab: Lab) -> None:
    assert lab.within("datm", "scored", *F, "--eval_it=2", "condense.save_every=2", "evaluation.steps=30") == 0
    lines = [json.loads(line) for line in lab.path("scored", "metrics.jsonl").read_text().splitlines()]
    scores = {line["iteration"]: line["val_micro"] for line in lines if "val_micro" in line}
    assert list(scores) == [2, 4, 6, 8] and len(set(scores.values())) > 1
    best = next(i for i in scores if scores[i] == max(scores.values()))
    assert same_bits(lab.learned("scored"), lab.learned("scored", str(best)))


def test_several_sets_stand_in_one_table(lab: Lab) -> None:
    assert lab.within("mtt", "several", "--num_exp=2", "--Iteration=1") == 0
    sets = [load_synthetic(path).data for path in (lab.folder / "several").rglob("syn_data_best.pth")]
    assert len(sets) == 2 and not torch.equal(sets[0], sets[1])
    assert sorted(s["seed"] for s in lab.students("several")) == [0, 1]


@pytest.mark.parametrize("program", ["mtt", "datm"])
def test_a_learned_set_beats_its_start(lab: Lab, program: str) -> None:
    more = ("--init=real", "--Iteration=50", "--syn_steps=10", "condense.batch_syn=null", "evaluation.steps=100")
    rows = ("evaluation.rows=[distilled,start]", "--num_eval=2", "evaluation.probe_every=100", "--no_tta")
    assert lab.within(program, f"long {program}", *more, *rows) == 0
    learned, start = (lab.last(f"long {program}", row) for row in ("distilled", "start"))
    assert learned > start + 8 and learned > 60


def values_of(out: str) -> dict[str, str]:
    """What a dry run prints."""
    lines = [line.split(": ", 1) for line in out.splitlines() if line.startswith("  ")]
    return {name.strip(): value.rsplit("  [", 1)[0] for name, value in lines}


PLACES = "--buffer_path ./buffers --data_path ../data --eval_it 100"
LABELS = f"--dataset=CIFAR100 --ipc=48 --lbd 0.0005 --feat-lbd 0.0001 --pooling avg --zca {PLACES}"
REQUIRED = {  # the requirement's chain; how its values are read
    f"--dataset=CIFAR100 --ipc=48 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca --lr_img=1000 "
    f"--lr_lr=1e-05 --lr_teacher=0.01 {PLACES}": {"condense.max_start_epoch": "20", "feature": "None"},
    f"{LABELS}  --generate_pretrained": {"generate_pretrained": "True", "feature.lbd": "0.0005"},
    f"{LABELS} --tta --tta_mode 'hflip' --Iteration 8000": {
        "evaluation.tta": "True", "evaluation.tta_mode": "hflip", "condense.niter": "8000", "feature.lbd": "0.0005",
        "feature.feat_lbd": "0.0001", "feature.form": "channel", "feature.pooling": "avg",
    },
}  # fmt: skip


@pytest.mark.parametrize("command", REQUIRED)
def test_the_requirement_s_commands_mean_what_they_say(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(f"mtt.py {command} --dry_run"))
    assert mtt.main() == 0
    said = capsys.readouterr()
    expected = {
        "dataset.dataset": "cifar100", "dataset.nclass": "100", "dataset.size": "32", "network.depth": "3",
        "network.width": "128", "condense.ipc": "48", "condense.syn_steps": "20", "condense.expert_epochs": "3",
        "condense.lr_img": "1000.0", "condense.lr_lr": "1e-05", "condense.lr_teacher": "0.01", "zca": "True",
        "condense.val_every": "100", "condense.mode": "exact", "buffer_path": str(Path("buffers").absolute()),
    }  # fmt: skip
    assert (expected | REQUIRED[command]).items() <= values_of(said.out).items() and not said.err
    assert "20 steps" in said.out and "is absent; nothing can be learned" in said.out
