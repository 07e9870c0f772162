"""Tables of results are what the numbers behind them say, and every one has numbers behind it."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import yaml

from config import ConfigError
from scripts import sweep
from scripts.table import Column, cell, check, collect, collected, is_number, main, records_of, tables_of
from utils.run_folder import REPOSITORY

MANIFEST = """
scores:
  words: [set, images]
  runs: "*/digits/*"
  columns:
    - {title: test, score: test}
    - {title: over random, score: test, against: random, digits: 2}
    - {title: s, score: seconds, digits: 0, of: median}
  rows:
    - {words: ["**learned**", "1"], row: learned}
    - {words: [random, "1"], row: random, given: {over random: ""}}
speed:
  kind: recorded
  command: python -m timing
  words: [""]
  columns: [{title: ratio, digits: 2}]
  rows: [[ours, [1.5, 1.25, 2]], [theirs, 1], [both, [1.25, 0.5]], [none, null]]
"""
LEARNED, RANDOM, SECONDS = [80.0, 81.5, 82.1, 79.0], [60.0, 62.0, 61.3, 60.5], [3.0, 1.0, 2.0, 90.0]
SPEED = (
    "| | ratio |\n|---|---:|\n| ours | 1.50 [1.25 - 2.00] |\n| theirs | 1.00 |\n| both | 1.25 ± 0.50 |\n| none | |\n"
)
OPTIONS = "| option | default |\n|---|---|\n| `lr` | `0.1` of the papers, 2 here |\n"


def make_run(folder: Path) -> Path:
    (folder / "students").mkdir(parents=True)
    for row, values in (("learned", LEARNED), ("random", RANDOM)):
        for student, (value, seconds) in enumerate(zip(values, SECONDS, strict=True)):
            numbers = {"test": value, "seconds": seconds, "labels": "hard"}
            (folder / "students" / f"{row}_seed{student // 2}_{student % 2}.json").write_text(json.dumps(numbers))
    (folder / "result.json").write_text('{"students": 8}')
    return folder


def scores() -> str:
    over = np.subtract(LEARNED, RANDOM)
    rows = [
        f"| **learned** | 1 | {np.mean(LEARNED):.1f} ± {np.std(LEARNED, ddof=1):.1f} "
        f"| {over.mean():+.2f} ± {over.std(ddof=1) / len(over) ** 0.5:.2f} | 2 |",
        f"| random | 1 | {np.mean(RANDOM):.1f} ± {np.std(RANDOM, ddof=1):.1f} | | 2 |",
    ]
    return "\n".join(["| set | images | test | over random | s |", "|---|---:|---:|---:|---:|", *rows, ""])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    collect(tmp_path / "room" / "results.jsonl", [make_run(tmp_path / "results" / "room" / "digits" / "run")])
    (tmp_path / "room" / "tables.yaml").write_text(MANIFEST)
    (tmp_path / "room" / "RESULTS.md").write_text(f"# R\n\ntext\n<!-- table: speed -->\n{SPEED}\nmore\n")
    (tmp_path / "README.md").write_text(f"# A\n\n{OPTIONS}\n<!-- table: scores -->\n{scores()}")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_every_table_of_this_repository_is_what_its_numbers_say() -> None:
    assert check(REPOSITORY) == []


def test_cells_are_mean_and_deviation_over_students_as_numpy_has_them(root: Path) -> None:
    assert check(root) == []


def test_a_column_may_count_and_may_be_of_other_runs(root: Path) -> None:
    run = make_run(root / "results" / "room" / "timed" / "run")
    (run / "students" / "learned_seed9_9.json").write_text('{"test": 0.0, "seconds": 2000.0}')
    collect(root / "room" / "results.jsonl", [run])
    column = "- {title: n, score: seconds, of: count, instead: [digits, timed]}"
    edit(root / "room" / "tables.yaml", "of: median}", f"of: median}}\n    {column}")
    edit(root / "README.md", "| s |", "| s | n |")
    edit(root / "README.md", "---:|---:|---:|\n", "---:|---:|---:|---:|\n")
    edit(root / "README.md", " | 2 |\n| random", " | 2 | 5 |\n| random")
    edit(root / "README.md", "| | 2 |", "| | 2 | 4 |")
    assert check(root) == []


def test_a_difference_pairs_the_runs_of_a_seed(tmp_path: Path) -> None:
    scores = {"ours": {0: 82.0, 1: 85.0, 2: 81.0}, "theirs": {2: 80.0, 1: 83.0, 0: 81.0, 3: 99.0}}
    runs = [(name, seed, value) for name, some in scores.items() for seed, value in some.items()]
    for name, seed, value in runs:
        folder = tmp_path / f"{name}_seed{seed}_{abs(hash(name)):x}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps({"top1": value}))
    collect(tmp_path / "results.jsonl", [*tmp_path.glob("*_seed*")])
    records, column = (
        records_of(tmp_path / "results.jsonl"),
        Column(title="gain", score="top1", over="*/theirs_*", digits=2),
    )
    error = np.std([1, 2, 1], ddof=1) / 3**0.5
    assert cell(records, "*/ours_*", "", column) == f"+1.33 ± {error:.2f}"
    with pytest.raises(ConfigError, match="none has seed 3"):
        cell(records, "*/theirs_*", "", Column(title="gain", score="top1", over="*/ours_*"))
    twice = [*records, records[0]._replace(run=f"{records[0].run}b")]
    with pytest.raises(ConfigError, match="two runs of one seed"):
        cell(twice, "*/ours_*", "", column)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*/results.jsonl")), ids=lambda path: path.parent.name)
def test_collecting_leaves_the_records_of_other_runs_as_they_are(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "results.jsonl"
    copy.write_bytes(path.read_bytes())
    collect(copy, [])
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("data", ["digits", "cifar100_small"])
def test_every_run_of_the_comparison_of_methods_is_in_one_row_of_its_table(data: str) -> None:
    runs = sweep.read_sweep(REPOSITORY / "config" / "kd" / "manifests" / f"compare_{data}.txt", [0], [])
    names = ["/".join(run.folder.parts[-4:]) for run in runs if run.origin != "teacher"]
    tables = yaml.safe_load((REPOSITORY / "kd" / "tables.yaml").read_text())
    own = [row["runs"] for row in tables[f"kd-compare-{data.removesuffix('_small')}"]["rows"]]
    assert [sum(fnmatchcase(name, row) for row in own) for name in names] == [1] * len(names) == [1] * len(own)
    others = [row["runs"] for row in tables["kd-digits"]["rows"]]
    assert not any(fnmatchcase(name, row) for name in names for row in others)


@pytest.mark.parametrize(
    "old, new", [("80.7", "80.8"), ("| 1 |", "| 2 |"), ("| random |", "| herding |"), (" | 2 |", " |")]
)
def test_a_changed_cell_is_found_and_written_back(root: Path, old: str, new: str) -> None:
    before = (root / "README.md").read_text()
    edit(root / "README.md", old, new)
    (line,) = check(root)
    assert line.startswith("README.md:8: scores: ")
    assert check(root, write=True) == []
    assert (root / "README.md").read_text() == before


@pytest.mark.parametrize("name", ["README.md", "room/RESULTS.md"])
def test_a_table_of_results_without_a_marker_is_found(root: Path, name: str) -> None:
    text = (root / name).read_text()
    (root / name).write_text("\n".join(line for line in text.split("\n") if not line.startswith("<!--")))
    found = check(root)
    assert any("without <!-- table: NAME -->" in line and line.startswith(name) for line in found)
    assert any(line.endswith("no table has this marker") for line in found)


@pytest.mark.parametrize(
    "table", ["a | b\n--|--\nx | 1", "> | a |\n> |---|\n> | **3.5 ± 1** |", "| a |\n|:-:|\n| 5 [4 - 6] |"]
)
def test_no_way_to_write_a_table_of_numbers_hides_it(root: Path, table: str) -> None:
    (root / "room" / "README.md").write_text(f"text\n\n{table}\n")
    assert check(root) == ["room/README.md:3: a table of results without <!-- table: NAME --> above it"]


def test_a_table_in_html_is_refused(root: Path) -> None:
    (root / "room" / "README.md").write_text("<table><tr><td>1</td></tr></table>\n")
    with pytest.raises(ConfigError, match=r"README.md:1: a table in HTML"):
        check(root)


def test_every_table_of_a_results_file_is_one_of_results(root: Path) -> None:
    (root / "RESULTS.md").write_text(OPTIONS)
    assert check(root) == ["RESULTS.md:1: a table of results without <!-- table: NAME --> above it"]


def test_what_stands_in_a_fence_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"```\n{SPEED}```\n\n{SPEED}")
    assert [place.start for place in tables_of(tmp_path / "a.md")] == [9]


def test_a_translation_has_its_own_words_and_the_same_numbers(root: Path) -> None:
    text = (root / "README.md").read_text().replace("random", "随机").replace("**learned**", "**学习**")
    (root / "README.zh-CN.md").write_text(text)
    assert check(root) == []
    edit(root / "README.zh-CN.md", "61.", "62.")
    assert len(check(root)) == 1


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("row: learned", "row: other", "no records of runs .* row 'other', score 'test'"),
        ("kind: recorded", "kind: guessed", "tables.yaml"),
        ("scores:", "scores: [", "tables.yaml"),
        ("score: test}", "score: test, typo: 1}", "typo"),
    ],
)
def test_an_entry_without_numbers_is_refused(root: Path, old: str, new: str, words: str) -> None:
    edit(root / "room" / "tables.yaml", old, new)
    with pytest.raises(ConfigError, match=words):
        check(root)


def test_a_marker_without_an_entry_is_found(root: Path) -> None:
    edit(root / "README.md", "table: scores", "table: score")
    assert "README.md:8: no tables.yaml has an entry score" in check(root)


def test_a_run_collected_again_replaces_its_records_only(root: Path) -> None:
    records, other = root / "room" / "results.jsonl", make_run(root / "results" / "room" / "digits" / "other")
    collect(records, [other])
    assert len(records_of(records)) == 4
    before = records.read_bytes()
    collect(records, [other])
    assert records.read_bytes() == before


def test_a_run_without_students_gives_its_own_numbers_and_those_of_its_parts(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"top1": 70.5, "epochs": 2, "name": "x", "teacher": {"top1": 80}}')
    found = {record.row: record.values for record in collected(tmp_path)}
    assert found == {"": {"top1": [70.5], "epochs": [2]}, "teacher": {"top1": [80]}}


def test_stages_of_learning_in_stages_are_scores(tmp_path: Path) -> None:
    (tmp_path / "students").mkdir()
    for order in range(2):
        numbers = {"accuracy": 90 + order, "classes": 4}
        (tmp_path / "students" / f"random_order{order}_stage1.json").write_text(json.dumps(numbers))
    (tmp_path / "result.json").write_text('{"rows": 1}')
    assert [(r.row, r.values) for r in collected(tmp_path)] == [("random", {"4 classes": [90, 91]})]


def test_an_unfinished_run_and_damaged_records_get_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, run = root / "room" / "results.jsonl", root / "results" / "room" / "digits" / "run"
    assert main(["collect", str(records), str(root)]) == 2
    assert "no finished run" in capsys.readouterr().err
    records.write_text('{"run": 5\n')
    assert main(["collect", str(records), str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["1", "**80.7 ± 1.1**", "3.11 [3.00 - 3.13]", "91.8 ± 1.0, 91.9 ± 1.0", "1,234", "+4.0 ± 0.1"]
)
def test_a_number_is_known_with_what_may_stand_around_it(text: str) -> None:
    assert is_number(text)


@pytest.mark.parametrize("text", ["", "-", "lr 0.1", "2.5e-4 of 1e-3", "MTT", "0.01 (papers)", "`a`: 1"])
def test_words_are_no_number(text: str) -> None:
    assert not is_number(text)
