"""Shipped configurations of trajectory matching: they plan, have the published values, fit experts, and are chained."""

import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT

from condenser.synthetic_set import load_synthetic
from config import add_args_from_yaml, flatten
from distill_feat import buffer, datm, mtt
from distill_feat.trajectory_job import TrajectoryRunConfig

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # within pytest's own process
FILES, FOLDER = ROOT / "config" / "distill_feat", ROOT / "distill_feat"
MAIN: dict[str, Callable[[], int]] = {"mtt": mtt.main, "datm": datm.main, "buffer": buffer.main}
SETS = sorted(path for kind in ("mtt", "datm") for path in (FILES / kind).glob("*.yaml"))
EXPERTS = sorted(path for path in (FILES / "buffer").glob("*.yaml") if path.stem != "base")
Run = Callable[..., dict[str, str]]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def config_of(path: Path) -> TrajectoryRunConfig:
    return add_args_from_yaml(TrajectoryRunConfig, path, (), FOLDER).config


def row_of(name: str, keys: str) -> list[str]:
    values = {"feature.lbd": "-", "feature.form": "-"} | flatten(config_of(FILES / f"{name}.yaml"))
    return [str(values[key]) for key in keys.split()]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What a dry run of a program prints: its values, lines of other sorts under their first word."""

    def run(program: str, *words: str) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *words, "--dry_run"])
        capsys.readouterr()
        assert MAIN[program]() == 0
        said = capsys.readouterr()
        assert not said.err
        lines = [line.split(": ", 1) for line in said.out.splitlines()]
        return {line[0].strip(): line[1].rsplit("  [", 1)[0] for line in lines}

    return run


@pytest.mark.parametrize("path", [*SETS, *EXPERTS], ids=name_of)
def test_every_file_prints_its_plan(path: Path, plan: Run) -> None:
    found = plan(path.parent.name, f"--config_path={path}")
    assert "run folder" in found and ("iterations" in found or "storage" in found)


KEYS = (
    "condense.syn_steps condense.expert_epochs condense.max_start_epoch condense.lr_img condense.lr_lr "
    "condense.lr_teacher condense.batch_syn zca condense.mode condense.niter"
)
MTT = """
    cifar10_ipc1             50 2  2    100.0 1e-07 0.01  None True  exact 5000
    cifar10_ipc10            30 2 20    100.0 1e-05 0.001 None True  exact 5000
    cifar10_ipc50            30 2 40   1000.0 1e-05 0.001 None False exact 5000
    cifar100_ipc1            20 3 20   1000.0 1e-05 0.01  None True  exact 5000
    cifar100_ipc10           20 2 20   1000.0 1e-05 0.01  None False exact 5000
    cifar100_ipc50           80 2 40   1000.0 1e-05 0.01  125  True  exact 5000
    tiny_ipc1                10 2 10  10000.0 0.0001 0.01 None False exact 5000
    tiny_ipc10               20 2 40  10000.0 0.0001 0.01 200  False exact 5000
    tiny_ipc50               20 2 40  10000.0 0.0001 0.01 300  False exact 5000
    imagenette_ipc1          20 2 10   1000.0 1e-06 0.01  None False exact 5000
    imagenette_ipc10         20 2 10   1000.0 1e-06 0.01  None False exact 5000
    cifar10_ipc10_zca_alt    30 2 20 100000.0 0.0001 0.01 None True  exact 5000
    cifar10_ipc1_nozca_alt   50 2  5   1000.0 1e-07 0.01  None False exact 5000
    cifar10_ipc10_nozca_alt  30 2 15   1000.0 1e-05 0.001 None False exact 5000
    cifar10_tesla_ipc1       50 2  5   1000.0 1e-07 0.01  None False tesla 5000
    cifar100_tesla_ipc50     80 2 40   1000.0 1e-05 0.01  125  True  tesla 5000
    imagenet_tesla_ipc1      10 3 10  10000.0 0.0001 0.01 100  False tesla 5000
    cifar10_ftd_ipc10        30 2 20    100.0 1e-05 0.001 None True  exact 5000
    cifar100_ftd_ipc10       20 2 40   1000.0 1e-05 0.01  None True  exact 5000
    imagenette_ftd_ipc1      20 2 10  10000.0 0.0001 0.01 64   False exact 5000
    imagenette_ftd_ipc10     20 2 10  10000.0 0.0001 0.01 64   False exact 5000
    cifar100_ipc48_pre       20 3 20   1000.0 1e-05 0.01  None True  exact 5000
    cifar100_ipc48           20 3 25   1000.0 1e-05 0.01  None True  exact 5000
    cifar100_ipc48_tta       20 3 25   1000.0 1e-05 0.01  None True  exact 8000
"""
KEYS_DATM = (
    "condense.syn_steps condense.expert_epochs condense.batch_syn condense.lr_img condense.lr_y condense.lr_lr "
    "condense.min_start_epoch condense.current_max_start_epoch condense.max_start_epoch condense.expansion_end_epoch "
    "condense.threshold condense.init feature.lbd feature.form"
)
DATM = """
    cifar10_ipc1        80 2 10     100.0  5.0 1e-07  0 None  4 0    1.1 correct - -
    cifar10_ipc9        80 2 100    100.0  2.0 1e-05  0 10   20 1000 1.0 correct 0.01 map
    cifar10_ipc10       80 2 100    100.0  2.0 1e-05  0 10   20 1000 1.0 correct - -
    cifar10_ipc48       80 2 500   1000.0  2.0 1e-05  0 20   40 2000 1.0 correct 0.01 map
    cifar10_ipc50       80 2 500   1000.0  2.0 1e-05  0 20   40 2000 1.0 correct - -
    cifar10_ipc500      40 2 1000    50.0 10.0 1e-05 40 None 60 0    1.0 correct - -
    cifar10_ipc1000    100 2 1000    50.0 10.0 1e-05 40 None 60 0    1.0 correct - -
    cifar100_ipc1       40 3 1000  1000.0 10.0 1e-05  0 10   20 1000 1.0 correct - -
    cifar100_ipc9       80 2 1000  1000.0 10.0 1e-05  0 30   50 2000 1.0 correct 0.01 map
    cifar100_ipc10      80 2 1000  1000.0 10.0 1e-05  0 30   50 2000 1.0 correct - -
    cifar100_ipc48      80 2 1000  1000.0 10.0 1e-05 20 None 70 0    1.0 real    0.01 map
    cifar100_ipc50      80 2 1000  1000.0 10.0 1e-05 20 None 70 0    1.0 real    - -
    cifar100_ipc100     80 2 1000    50.0 10.0 1e-05 30 None 70 0    1.0 correct - -
    tiny_ipc1           40 2 1000 10000.0 10.0 0.0001  0 15   20 2000 1.0 correct - -
    tiny_ipc10          40 2 500    100.0 10.0 0.0001 10 None 50 0    1.0 correct - -
    tiny_ipc10_feature  60 2 250    100.0 10.0 0.0001 10 None 50 0    1.0 correct 0.01 map
    tiny_ipc50          20 2 1000   100.0 10.0 0.0001 40 None 70 0    1.0 correct - -
"""
SIZES = {  # classes, pixels, depth
    "cifar10": (10, 32, 3), "cifar100": (100, 32, 3), "tinyimagenet": (200, 64, 4), "imagenette": (10, 128, 5),
    "imagenet": (1000, 64, 4),
}  # fmt: skip
PUBLISHED = [
    (kind, keys, *line.split()) for kind, keys, table in (("mtt", KEYS, MTT), ("datm", KEYS_DATM, DATM))
    for line in table.strip().splitlines()
]  # fmt: skip


def test_the_tables_here_name_all_that_is_published() -> None:
    own = ("base", "digits", "cifar10_small")
    assert {name_of(path) for path in SETS if not path.stem.startswith(own)} == {f"{r[0]}/{r[2]}" for r in PUBLISHED}


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}/{row[2]}")
def test_published_rows_have_the_published_values_and_students_of_a_thousand_epochs(row: tuple[str, ...]) -> None:
    kind, keys, name, *values = row
    assert row_of(f"{kind}/{name}", keys) == values
    cfg = config_of(FILES / kind / f"{name}.yaml")
    data, c, e = cfg.dataset, cfg.condense, cfg.evaluation
    assert f"_ipc{c.ipc}_" in f"_{name}_" and data.dataset.startswith(name.split("_")[0])
    assert (data.nclass, data.size, cfg.network.depth) == SIZES[data.dataset]
    assert e.batch_size == (128 if kind == "datm" else 256)
    assert e.steps == 1000 * math.ceil(c.ipc * data.nclass / e.batch_size) and e.steps % e.probe_every == 0
    assert c.soft_labels == (kind == "datm") and (
        not c.soft_labels or (cfg.zca, c.mom_y, c.niter) == (True, 0.9, 10_000)
    )
    if cfg.feature:
        f = cfg.feature
        own = (0.01, 0.02, "map") if kind == "datm" else (0.0005, 0.0001, "channel")
        assert (f.lbd, f.feat_lbd, f.form, f.pooling, f.feat_opt, f.lr_feat) == (*own, "avg", "adam", 0.01)


@pytest.mark.parametrize("path", SETS, ids=name_of)
def test_every_set_has_experts_that_keep_its_epochs_and_are_found_where_it_looks(path: Path) -> None:
    cfg, fitting = config_of(path), []
    first, last = cfg.condense.min_start_epoch, cfg.condense.max_start_epoch - 1 + cfg.condense.expert_epochs
    for file in EXPERTS:
        b = add_args_from_yaml(buffer.BufferConfig, file, (), FOLDER).config
        same = all(
            getattr(b.dataset, key) == getattr(cfg.dataset, key)
            for key in ("dataset", "nclass", "size", "val_fraction")
        )
        white = b.zca or not cfg.zca  # --no_zca leaves it out
        if same and b.network == cfg.network and white and b.buffer_path == cfg.buffer_path:
            assert b.experts.first_epoch <= first and last <= b.experts.last
            fitting.append(file.stem)
    assert len(fitting) == 1
    assert any(f"buffer/{fitting[0]}.yaml" in p.read_text() for p in (path, *bases(path)))


def bases(path: Path) -> list[Path]:
    """The files under a file, in its folder or beside it."""
    words = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("base:")]
    return [found for word in words for found in (path.parent / word, *bases(path.parent / word))]


CHAIN = "--buffer_path ./buffers --data_path ../data --eval_it 100"
LABELS = "--dataset=CIFAR100 --ipc=48 --lbd 0.0005 --feat-lbd 0.0001 --pooling avg --zca"
REQUIRED = {  # the requirement's commands, its programs' names apart
    "cifar100_ipc48_pre": (
        "--dataset=CIFAR100 --ipc=48 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca --lr_img=1000 "
        f"--lr_lr=1e-05 --lr_teacher=0.01 {CHAIN}"
    ),
    "cifar100_ipc48": f"{LABELS} {CHAIN}  --generate_pretrained",
    "cifar100_ipc48_tta": f"{LABELS} {CHAIN} --tta --tta_mode 'hflip' --Iteration 8000",
}


@pytest.mark.parametrize("name", REQUIRED)
def test_the_requirement_s_commands_mean_the_same_as_their_files(name: str, plan: Run) -> None:
    flags = plan("mtt", *shlex.split(REQUIRED[name]))
    file = plan("mtt", f"--config_path={FILES / 'mtt' / name}.yaml")
    values = [key for key in flags if "." in key or key in ("feature", "zca", "buffer_path", "generate_pretrained")]
    differing = {key for key in values if flags[key] != file[key]}
    only = {"generate_pretrained"} if "--generate_pretrained" in REQUIRED[name] else set()
    assert differing == {"dataset.data_dir", "buffer_path"} | only


def test_flags_alone_are_the_row_that_the_base_has_and_not_another(plan: Run) -> None:
    base = plan("datm", "--dataset=CIFAR100")
    assert base == plan("datm", f"--config_path={FILES}/datm/cifar100_ipc10.yaml")
    flags = plan("datm", *shlex.split("--dataset=CIFAR100 --ipc=48 --lbd 0.01 --feat-lbd 0.02"))
    file = plan("datm", f"--config_path={FILES}/datm/cifar100_ipc48.yaml")
    differing = {key for key in file if "." in key and flags[key] != file[key]}
    window = {"min_start_epoch", "current_max_start_epoch", "max_start_epoch", "expansion_end_epoch"}
    assert differing == {f"condense.{key}" for key in window | {"init"}} | {"evaluation.steps"}


@pytest.mark.parametrize("name", ["imagenette_ipc1", "imagenette_ftd_ipc10"])
def test_a_subset_of_imagenet_is_switched_by_its_flag(name: str, plan: Run) -> None:
    words = (f"--config_path={FILES}/mtt/{name}.yaml", "--subset", "imagefruit")
    nette, fruit = plan("mtt", *words[:1]), plan("mtt", *words)
    assert fruit["dataset.dataset"] == "imagefruit"
    assert {key for key in nette if nette[key] != fruit[key]} == {"dataset.dataset", "run folder"}


def test_a_start_s_file_is_loaded(plan: Run) -> None:
    found = plan("mtt", "--dataset=CIFAR100", "--ipc=48", "--init", "some/path.pth")
    assert (found["condense.init"], found["condense.load_path"]) == ("load", str(Path("some/path.pth").absolute()))


@pytest.mark.parametrize(
    ("program", "words"),
    [("mtt", "--min_start_epoch=25"), ("datm", "--max_start_epoch=20"), ("datm", "--current_max_start_epoch=51")],
)
def test_a_wrong_window_is_one_line(
    program: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words.split(), "--dry_run"])
    assert MAIN[program]() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "current_max_start_epoch" in line and "must rise" in line


TORCHRUN = 'printf "%s\\t" "$@" >> "$LOG"; echo >> "$LOG"'
PYTHON = 'echo "run folder: /learned/$(basename "$3" .yaml)"'  # $3: the configuration
SCRIPTS = {
    "run_mtt": (
        *(f"buffer {name}" for name in ("imagefruit", "imagenette", "imagewoof", "imagemeow", "imagesquawk")),
        "buffer imageyellow", "buffer cifar100", "mtt cifar100_ipc48_pre", "mtt cifar100_ipc48",
        "mtt cifar100_ipc48_tta",
    ),
    "run_datm": (
        "buffer cifar100_ftd", "buffer tiny_ftd", "datm cifar100_ipc9", "datm cifar100_ipc48",
        "datm tiny_ipc10_feature",
    ),
}  # fmt: skip


def commands(script: str, folder: Path, *words: str) -> list[list[str]]:
    """The words of every stage, which programs of our own in place of torchrun and python write down."""
    for name, body in {"torchrun": TORCHRUN, "python": PYTHON}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "data" / "imagenet").mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["bash", ROOT / "scripts" / f"{script}.sh", folder / "data", "3", *words], check=True, cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin", "LOG": str(folder / "log")}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").unlink()
    return [line.split("\t")[:-1] for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_every_stage_and_pass_options_on(script: str, tmp_path: Path, plan: Run) -> None:
    stages = commands(script, tmp_path, "--dry_run", "dataset.val_fraction=0.2")
    assert [f"{Path(words[1]).stem} {Path(words[3]).stem}" for words in stages] == list(SCRIPTS[script])
    for words in stages:
        assert words[0] == "--nproc_per_node=3" and "--dry_run" in words
        found = plan(Path(words[1]).stem, *words[2:])
        assert found["dataset.val_fraction"] == "0.2" and found["dataset.data_dir"].startswith(str(tmp_path / "data"))
    stages = commands(script, tmp_path, "experts.num_experts=2", "--", "condense.niter=5")
    for words in stages:
        assert ("experts.num_experts=2" in words, "condense.niter=5" in words) == (
            (True, False) if "buffer.py" in words[1] else (False, True)
        )


def test_stages_of_the_chain_start_from_the_file_of_the_one_before(tmp_path: Path) -> None:
    starts = [words[words.index("--init") + 1 :][:1] for words in commands("run_mtt", tmp_path) if "--init" in words]
    names = ("cifar100_ipc48_pre", "cifar100_ipc48")
    assert starts == [[f"/learned/{name}/distilled_data/syn_data_best.pth"] for name in names]


def test_the_file_that_a_dry_run_names_is_what_the_run_writes(
    tmp_path: Path, plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [f"buffer_path={tmp_path / 'experts'}", "dataset.size=8", "network.width=4", "network.depth=2"]
    words = [f"--config_path={FILES}/buffer/digits.yaml", *places, "--num_experts=1", "experts.last_epoch=2"]
    monkeypatch.setattr(sys, "argv", ["buffer.py", *words, "experts.batch_train=256"])
    assert buffer.main() == 0
    short = "--Iteration=1 --syn_steps=1 --expert_epochs=1 --max_start_epoch=1 evaluation.rows=[distilled] --num_eval=1"
    words = [f"--config_path={FILES}/mtt/digits_ipc1.yaml", *places, *short.split(), "evaluation.steps=1"]
    words += [f"save_dir={tmp_path / 'results'}", f"pretrained_dir={tmp_path / 'starts'}"]
    folder = Path(plan("mtt", *words)["run folder"])
    monkeypatch.setattr(sys, "argv", ["mtt.py", *words])
    assert mtt.main() == 0
    assert load_synthetic(folder / "distilled_data" / "syn_data_best.pth").data.shape == (10, 1, 8, 8)
