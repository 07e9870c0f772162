"""The three text programs as users start them: processes, ranks, signals, mistakes."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from launching import ROOT, Ended, start, torchrun, wait
from mini_lab import CLASSES, NITER, Lab, make_lab

from utils.report import Table, read_markdown
from utils.run_folder import starts_of

PROGRAMS = ("pretrain_script_text", "condense_script_text", "evaluate_script_text")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def base(lab: Lab) -> Lab:
    """With one undisturbed run, by one process, in `base`."""
    wait(lab.condense("base"))
    return lab


@pytest.fixture(scope="module")
def stopped(lab: Lab) -> Lab:
    """With a run in `stopped` that SIGTERM ended after its first saved states."""
    process = lab.condense("stopped")
    lab.wait_for_state("stopped", process)
    process.send_signal(signal.SIGTERM)
    done = wait(process, 128 + signal.SIGTERM)
    assert "SIGTERM" in done.last and "same command" in done.last
    assert 3 <= saved_iteration(lab, "stopped") < NITER
    return lab


def saved_iteration(lab: Lab, save: str) -> int:
    return int(torch.load(lab.run_folder(save) / "state.pth", weights_only=True)["iteration"])


def copy_run(lab: Lab, save: str) -> str:
    """A copy of the stopped run under another results folder."""
    shutil.copytree(lab.folder / "stopped", lab.folder / save)
    return save


@pytest.mark.parametrize("name", PROGRAMS)
def test_dry_run_works_from_any_folder_and_shows_where_values_come_from(lab: Lab, name: str) -> None:
    words = lab.words(name, "nothing", "--dry_run", "condense.ipc=3")
    own = [Path(words[0]).name, *words[1:]]
    module = ["-m", f"condense.{name}", *words[1:]]
    runs = [
        start([sys.executable, *own], ROOT / "condense"),
        start([sys.executable, *words], Path("/")),
        start([sys.executable, *module], lab.folder),
    ]
    first, *others = [wait(process).out for process in runs]
    assert "condense.ipc: 3  [command line]" in first
    assert "condense.refresh: 1  [default]" in first
    line = 1 + lab.yaml.read_text().splitlines().index("  num_freqs: 32")
    assert f"condense.num_freqs: 32  [{lab.yaml}:{line}]" in first
    places = [[text for text in out.splitlines() if "mini.yaml" not in text] for out in (first, *others)]
    assert places[0] == places[1] == places[2]
    assert not (lab.folder / "nothing").exists()


def test_dry_run_needs_neither_data_nor_weights(lab: Lab) -> None:
    absent = ("dataset.data_dir=/no/data", "network.model_path=/no/encoder")
    runs = [lab.start(name, "nothing", "--dry_run", *absent) for name in PROGRAMS]
    for process in runs:
        done = wait(process)
        for path in ("/no/data", "/no/encoder"):
            assert len([line for line in done.out.splitlines() if f"{path} is absent" in line]) == 1
        assert not done.err


def test_learned_set_does_not_depend_on_the_number_of_ranks(base: Lab) -> None:
    runs = {ranks: base.condense(f"ranks{ranks}", ranks=ranks) for ranks in (2, 3)}
    for ranks, process in runs.items():
        wait(process)
        for iteration in (0, 20):
            difference = base.rows(f"ranks{ranks}", iteration) - base.rows("base", iteration)
            assert float(difference.abs().max()) <= 1e-5
    assert float((base.rows("base", 20) - base.rows("base", 0)).abs().max()) > 1e-2


def test_killed_run_goes_on_to_the_same_bits(base: Lab) -> None:
    process = base.condense("killed")
    base.wait_for_state("killed", process)
    process.kill()
    wait(process, -signal.SIGKILL)
    assert not (base.run_folder("killed") / "result.json").exists()
    done = wait(base.condense("killed"))
    assert "resumed at iteration" in done.err
    assert torch.equal(base.rows("killed"), base.rows("base"))
    assert metrics(base, "killed") == metrics(base, "base")


def metrics(lab: Lab, save: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (lab.run_folder(save) / "metrics.jsonl").read_text().splitlines()]


def test_stopped_run_goes_on_then_is_finished_then_starts_anew(base: Lab, stopped: Lab) -> None:
    save = copy_run(stopped, "goes_on")
    assert "resumed at iteration" in wait(base.condense(save)).err
    assert torch.equal(base.rows(save), base.rows("base"))
    assert "finished already" in wait(base.condense(save)).err
    anew = wait(base.condense(save, "--overwrite"))
    assert "resumed" not in anew.err and "finished already" not in anew.err
    assert torch.equal(base.rows(save), base.rows("base"))


def test_stopped_run_goes_on_with_another_number_of_ranks(base: Lab, stopped: Lab) -> None:
    save = copy_run(stopped, "more_ranks")
    assert "resumed at iteration" in wait(base.condense(save, ranks=2)).err
    assert float((base.rows(save) - base.rows("base")).abs().max()) <= 1e-5
    folder = base.run_folder(save)
    assert [start.environment["processes"] for start in starts_of(folder)] == ["1", "2"]
    page = (folder / "report.html").read_text()
    assert "torchrun --nproc_per_node=2" in page and "Commands of earlier starts" in page


def test_a_set_that_was_not_moved_says_words_of_its_class_in_its_report(lab: Lab) -> None:
    wait(lab.condense("unmoved", "condense.niter=0"))
    _, blocks = read_markdown((lab.run_folder("unmoved") / "report.md").read_text(), lab.run_folder("unmoved"))
    (table,) = (block for block in blocks if isinstance(block, Table) and "words" in block.header)
    documents = [json.loads(line) for line in (lab.folder / "data" / "train.jsonl").read_text().splitlines()]
    for name, labels, words in table.rows:
        text = " ".join(document["text"] for document in documents if name in document["labels"])
        said = {*words.split()} - {"[CLS]", "[SEP]"}
        assert name in labels and said and all(word in text for word in said)
    assert {row[0] for row in table.rows} == {*CLASSES}


def break_state(lab: Lab) -> list[str]:
    folder = lab.run_folder(copy_run(lab, "broken_state"))
    for file in (folder / "state.pth", folder / "state.previous.pth"):
        file.write_bytes(b"not a state")
    return ["broken_state"]


def break_teacher(lab: Lab) -> list[str]:
    copy = lab.folder / "broken_teachers"
    shutil.copytree(lab.folder / "teachers", copy)
    (file,) = copy.glob("mini/ipc2/*/premodel1_epoch2.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    return ["m1", f"pretrained_dir={copy}"]


def break_load(lab: Lab) -> list[str]:
    file = lab.folder / "foreign.pth"
    torch.save({"weights": torch.zeros(3)}, file)
    return ["m2", "--init=load", f"--load_path={file}"]


def break_yaml(lab: Lab) -> list[str]:
    file = lab.folder / "typo.yaml"
    file.write_text(lab.yaml.read_text().replace("num_freqs:", "num_freq:"))
    return ["m3", f"--config_path={file}"]


MISTAKES: dict[str, tuple[int, Callable[[Lab], list[str]], tuple[str, ...]]] = {
    "typo": (2, break_yaml, ("typo.yaml:", "condense.num_freq", "did you mean 'num_freqs'?")),
    "no data": (1, lambda lab: ["m4", "dataset.data_dir=/no/data"], ("/no/data", "dataset.data_dir")),
    "nclass": (1, lambda lab: ["m5", "dataset.nclass=7"], ("dataset.nclass: 7", "5 classes")),
    "state": (1, break_state, ("state.pth", "delete")),
    "teacher": (1, break_teacher, ("premodel1_epoch2.safetensors", "delete it")),
    "load": (1, break_load, ("foreign.pth", "synthetic set")),
}


@pytest.fixture(scope="module")
def mistakes(stopped: Lab) -> dict[str, Ended]:
    """How the program ended on each mistake; two processes at a time."""
    words = [prepare(stopped) for _, prepare, _ in MISTAKES.values()]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(lambda more: wait(stopped.condense(*more), None), words), strict=True))


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_is_one_line_with_a_remedy(mistakes: dict[str, Ended], kind: str) -> None:
    status, _, parts = MISTAKES[kind]
    done = mistakes[kind]
    assert done.status == status
    assert "Traceback" not in done.err
    assert all(part in done.last for part in parts), done.err
    log_lines = [line for line in done.err.strip().splitlines()[:-1] if "teachers in" not in line]
    assert not log_lines


def test_mistake_is_said_once_by_several_ranks(lab: Lab) -> None:
    done = wait(lab.condense("m6", "dataset.nclass=7", ranks=2), 1)
    assert done.err.count("dataset.nclass: 7, but mini has 5 classes") == 1
    assert "[rank1]" not in done.err


def test_full_disk_names_the_file_and_loses_nothing(stopped: Lab) -> None:
    save = copy_run(stopped, "full_disk")
    before = (stopped.run_folder(save) / "state.pth").read_bytes()
    words = [sys.executable, *map(str, stopped.words("condense_script_text", save))]
    done = wait(start(["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *words]), 1)  # files of at most 20 KiB
    assert "Traceback" not in done.err
    assert "state.pth: cannot be written" in done.last
    assert (stopped.run_folder(save) / "state.pth").read_bytes() == before


def test_evaluation_reports_every_row(base: Lab) -> None:
    done = wait(base.start("evaluate_script_text"))
    (path,) = (base.folder / "base" / "condense" / "evaluate").rglob("report.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["condensed", "random", "full", "initial"]
    fields = {"name", "ipc", "labels", "micro_mean", "micro_std", "macro_mean", "macro_std", "map_mean", "threshold",
              "bytes", "documents", "seconds"}  # fmt: skip
    assert all(fields <= row.keys() for row in rows.values())
    assert all(0 <= row["micro_mean"] <= 100 and row["labels"] == "hard" for row in rows.values())
    assert (rows["full"]["documents"], rows["condensed"]["documents"]) == (40, 10)
    assert rows["random"]["documents"] <= 10
    # 10 rows of 16 embeddings of 128 float32, a mask bit per position, a byte of packed labels a row
    assert rows["condensed"]["bytes"] == rows["initial"]["bytes"] == 10 * (16 * 128 * 4 + 2 + 1)
    assert "full data" in done.out and "report.html" in done.out


def test_evaluation_without_its_run_says_which_command_is_missing(lab: Lab) -> None:
    done = wait(lab.start("evaluate_script_text", "never_condensed"), 1)
    assert "Traceback" not in done.err
    (line,) = done.err.strip().splitlines()
    assert "condense_script_text.py" in line and "seed=0" in line


def test_what_was_made_from_other_documents_is_refused(lab: Lab) -> None:
    data, save = lab.folder / "own_data", "own_data_runs"
    shutil.copytree(lab.folder / "data", data)
    own = (f"dataset.data_dir={data}", "condense.niter=3", "evaluation.rows=[random,condensed]")
    wait(lab.condense(save, *own))
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "corna corna", "labels": ["corn"]}) + "\n")
    finished, judged = lab.condense(save, *own), lab.start("evaluate_script_text", save, *own)
    assert "finished already" in wait(finished).err
    done = wait(judged, 1)
    assert "made from other data" in done.last and done.last.endswith("with seed=0 --overwrite"), done.err
    assert not list((lab.folder / save).rglob("students"))
    (lab.run_folder(save) / "result.json").unlink()  # a run that is not finished
    again, anew = wait(lab.condense(save, *own), 1), wait(lab.condense(save, *own, "--overwrite"), 1)
    assert str(lab.run_folder(save)) in again.last and again.last.endswith("start again with --overwrite")
    assert "teachers" in anew.last and anew.last.endswith("pretraining program with --overwrite")


@pytest.fixture
def tiny_bert(shared_data: Path, tmp_path: Path) -> Path:
    """A random BERT of two layers over the public vocabulary, saved as an encoder folder."""
    from transformers import BertConfig, BertModel

    vocabulary = shared_data / "bert_vocab" / "vocab.txt"
    if not vocabulary.is_file():
        pytest.skip(f"absent: {vocabulary}")
    settings = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(settings).save_pretrained(tmp_path / "bert")
    shutil.copy(vocabulary, tmp_path / "bert")
    return tmp_path / "bert"


def test_six_ranks_condense_ninety_classes_as_in_the_readme(shared_data: Path, tiny_bert: Path, tmp_path: Path) -> None:
    corpus = shared_data / "reuters" / "nltk_data"
    if not corpus.is_dir():
        pytest.skip(f"absent: {corpus}")
    command = [
        *torchrun(6), "--nnodes=1", "condense_script_text.py", "--gpu=0,2,3,4,5,6",
        "--config_path=../config/ipc10/reuters.yaml",
        f"network.model_path={tiny_bert}", "network.depth=2", "network.layer_index=[1,2]", "network.max_length=64",
        f"dataset.data_dir={corpus}", "pretrain.epochs=1", "pretrain.batch_size=256", "condense.niter=2",
        "condense.teacher_model_epoch=1", "condense.num_premodel=1", f"save_dir={tmp_path / 'results'}",
        f"pretrained_dir={tmp_path / 'teachers'}", f"cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    done = wait(start(command, ROOT / "condense"))
    assert done.err.count("--gpu=0,2,3,4,5,6 is ignored") == 1
    (data,) = (tmp_path / "results").rglob("distilled_data")
    sets = [torch.load(data / f"syn_data_{i}.pth", weights_only=True)["data"] for i in (0, 2)]
    assert [part.shape for part in sets] == [(900, 64, 32)] * 2
    assert not torch.equal(*sets)
