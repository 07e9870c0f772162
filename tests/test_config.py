"""The configuration: precedence, strictness, paths, sources, and the grammar of the command line."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from config import (
    CommandLine,
    ConfigError,
    LocalPath,
    ModelPath,
    Option,
    Resolved,
    Section,
    add_args_from_yaml,
    parse_command_line,
)
from config.document import COMMAND_LINE, parse
from config.loader import flatten


class Dataset(Section):
    dataset: str
    data_dir: LocalPath = Path("../data")


class Match(Section):
    layer: int
    loss: Literal["mse", "cosine"] = "mse"


class Condense(Section):
    ipc: int = Field(default=10, ge=1)
    niter: int = 400
    lr: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    alpha: float = 0.5
    beta: float = 0.5
    layer_index: tuple[int, ...] = (3, 6)
    per_class: int | tuple[int, ...] = 1
    matches: tuple[Match, ...] = ()

    @model_validator(mode="after")
    def weights(self) -> "Condense":
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta\nmust not both be 0")
        return self


class Root(Section):
    seed: int = 0
    debug: bool = False
    tf32: bool = True
    model: ModelPath = "scratch:tiny"
    dataset: Dataset
    condense: Condense = Condense(niter=300)
    extra: Condense | None = None


PROGRAM = Path("/programs/condense")
GOOD = """\
seed: 1
dataset:
  dataset: reuters
condense:
  ipc: 5
  lr: 1e-4
  optimizer: adam
  layer_index: [3, 6, 9]
"""
OPTIONS = (
    Option("ipc", "condense.ipc", "value", "samples of each class"),
    Option("init", "condense.init", "value", "how to start", ("random", "noise", "mix", "load")),
    Option("load_path", "condense.load_path", "path", "samples to start from"),
    Option("sampling_net", "condense.sampling_net", "flag", "learn the frequencies, 100% optional"),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that messages name files by their bare names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Resolved[Root]:
    Path("main.yaml").write_text(text)
    return add_args_from_yaml(Root, Path("main.yaml"), overrides, PROGRAM)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def command(*words: str, options: tuple[Option, ...] = OPTIONS) -> CommandLine:
    return parse_command_line(["--config_path", "main.yaml", *words], "Condense.", options)


@pytest.mark.parametrize("given", [*itertools.product([False, True], repeat=3)])
def test_command_line_beats_file_beats_base_beats_default(given: tuple[bool, ...]) -> None:
    in_base, in_file, in_override = given
    Path("base.yaml").write_text("dataset: {dataset: a}\n" + "condense: {niter: 1}\n" * in_base)
    text = "base: base.yaml\n" + "condense: {niter: 2}\n" * in_file
    resolved = load(text, *["condense.niter=3"] * in_override)
    places = {3: "command line", 2: "main.yaml:2", 1: "base.yaml:2", 300: "default"}
    expected = 3 if in_override else 2 if in_file else 1 if in_base else 300
    assert resolved.config.condense.niter == expected
    assert resolved.sources["condense.niter"] == places[expected]


def test_bases_chain_across_folders_and_sections_merge_key_by_key() -> None:
    for name in ("base", "ipc10"):
        Path(name).mkdir()
    Path("root.yaml").write_text("dataset: {dataset: far}\ncondense: {ipc: 1, niter: 1, lr: 1.0}\n")
    Path("base/a.yaml").write_text("base: ../root.yaml\ncondense: {niter: 2, lr: 2.0}\n")
    Path("ipc10/a.yaml").write_text("base: ../base/a.yaml\ncondense: {lr: 3.0}\n")
    config = add_args_from_yaml(Root, Path("ipc10/a.yaml"), (), PROGRAM).config
    assert (config.dataset.dataset, config.condense.ipc, config.condense.niter) == ("far", 1, 2)
    assert config.condense.lr == 3.0


def test_base_that_is_missing_or_circular_is_one_line() -> None:
    Path("other.yaml").write_text("base: main.yaml\n")
    (line,) = problems("base: other.yaml\n" + GOOD)
    assert "main.yaml -> other.yaml -> main.yaml" in line
    (line,) = problems("seed: 1\nbase: othr.yaml\n")
    assert line == "main.yaml:2: base: othr.yaml: no such file; did you mean 'other.yaml'?"


def test_missing_file_names_path_and_nearest() -> None:
    Path("reuters.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match="reuter.yaml: no such file; did you mean 'reuters.yaml'"):
        add_args_from_yaml(Root, Path("reuter.yaml"), (), PROGRAM)


@pytest.mark.parametrize("text", ["1e-4", "5E3", ".5", "1.", "-2.5e-3", "+1e2", "1_000.5", "7", ".inf"])
def test_numbers_read_as_python_reads_them(text: str) -> None:
    assert load(GOOD, f"condense.lr={text}").config.condense.lr == float(text.replace(".inf", "inf"))


@pytest.mark.parametrize("text", ["010", "1:30", "1e", "e4", "2024-01-31", "1.2.3"])
def test_nothing_else_is_taken_for_a_number(text: str) -> None:
    assert problems(GOOD, f"condense.lr={text}") == [f"command line: condense.lr: '{text}' is not a number"]


@pytest.mark.parametrize("text", ["off", "no", "on", "Yes"])
def test_only_true_and_false_are_truth_values(text: str) -> None:
    assert parse(text, COMMAND_LINE, PROGRAM, []) == text
    assert problems(GOOD, f"debug={text}") == [f"command line: debug: '{text}' is not true or false"]


def test_lists_become_tuples_and_everything_is_frozen() -> None:
    config = load(GOOD).config
    assert config.condense.layer_index == (3, 6, 9)
    with pytest.raises(ValidationError, match="frozen"):
        config.condense.ipc = 3  # type: ignore[misc]


def test_default_section_keeps_its_own_values_under_a_partial_file() -> None:
    assert load(GOOD).config.condense.niter == 300


def test_optional_section_is_none_until_given() -> None:
    assert load(GOOD).config.extra is None
    assert load(GOOD, "extra.ipc=2").config.extra == Condense(ipc=2)
    assert load(GOOD + "extra: {ipc: 2}\n", "extra=null").config.extra is None


def test_relative_paths_start_where_they_were_written(folder: Path) -> None:
    assert load(GOOD).config.dataset.data_dir == Path("/programs/data")
    nearby = GOOD.replace("reuters\n", "reuters\n  data_dir: ./x/../y\n")
    assert load(nearby).config.dataset.data_dir == PROGRAM / "y"
    assert load(nearby, "dataset.data_dir=../z").config.dataset.data_dir == folder.parent / "z"
    assert load(GOOD, "dataset.data_dir=~/z").config.dataset.data_dir == Path.home() / "z"
    assert load(GOOD, "dataset.data_dir=/a/../b").config.dataset.data_dir == Path("/b")


def test_only_model_names_that_look_like_paths_are_resolved(folder: Path) -> None:
    for name in ("scratch:tiny", "bert-base-uncased", "google/bert"):
        assert load(f"model: {name}\n" + GOOD).config.model == name
    assert load("model: ../models/bert\n" + GOOD).config.model == "/programs/models/bert"
    assert load(GOOD, "model=./bert").config.model == str(folder / "bert")


def test_sources_name_every_leaf_by_line() -> None:
    resolved = load(GOOD, "seed=3")
    assert set(resolved.sources) == set(flatten(resolved.config))
    for key, place in resolved.sources.items():
        if place.startswith("main.yaml:"):
            written = GOOD.splitlines()[int(place.partition(":")[2]) - 1]
            assert written.strip().startswith(key.rpartition(".")[2] + ":")
    assert (resolved.sources["seed"], resolved.sources["condense.beta"]) == ("command line", "default")


def test_flat_values_survive_json() -> None:
    flat = flatten(load(GOOD, "condense.matches=[{layer: 3}]").config)
    assert json.loads(json.dumps(flat)) == flat
    assert flat["condense.layer_index"] == [3, 6, 9]
    assert flat["condense.matches"] == [{"layer": 3, "loss": "mse"}]
    assert flat["dataset.data_dir"] == "/programs/data"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 1", "seed: true", "main.yaml:1: seed: true is not an integer"),
        ("seed: 1", "seed: ~", "main.yaml:1: seed: null is not an integer"),
        (
            "seed: 1",
            "niter: 1",
            "main.yaml:1: niter: unknown key; known in section 'condense' and in section 'extra'",
        ),
        (
            "seed: 1",
            "x: 1",
            "main.yaml:1: x: unknown key; known: seed, debug, tf32, model, dataset, condense, extra",
        ),
        (
            "seed: 1",
            "<<: {}",
            "main.yaml:1: <<: unknown key; known: seed, debug, tf32, model, dataset, condense, extra",
        ),
        (
            "dataset: reuters",
            "datset: x",
            "main.yaml:3: dataset.datset: unknown key; did you mean 'dataset'?",
        ),
        ("  dataset: reuters", "  data_dir: x", "main.yaml: dataset.dataset: required, and not given"),
        ("  dataset: reuters", "  dataset: 12", "main.yaml:3: dataset.dataset: 12 is not text"),
        (
            "dataset:\n  dataset: reuters",
            "dataset: a",
            "main.yaml:2: dataset: 'a' is not a section; its keys are",
        ),
        ("dataset:\n  dataset: reuters", "dataset:", "main.yaml: dataset.dataset: required, and not given"),
        ("reuters", "r\n  data_dir: 3", "main.yaml:4: dataset.data_dir: 3 is not a path"),
        ("reuters", "r\n  data_dir: ''", "main.yaml:4: dataset.data_dir: '' is not a path"),
        ("ipc: 5", "ipc: 5.0", "main.yaml:5: condense.ipc: 5.0 is not an integer"),
        ("ipc: 5", "ipc: 0", "main.yaml:5: condense.ipc: 0 should be greater than or equal to 1"),
        ("ipc: 5", "nitr: 5", "main.yaml:5: condense.nitr: unknown key; did you mean 'niter'?"),
        ("ipc: 5", "seed: 5", "main.yaml:5: condense.seed: unknown key; known at the top level"),
        ("ipc: 5", "ipc: 5\n  ipc: 6", "main.yaml:6: condense.ipc: given twice (first in line 5)"),
        ("lr: 1e-4", "lr: many", "main.yaml:6: condense.lr: 'many' is not a number"),
        (
            "adam",
            "adm",
            "main.yaml:7: condense.optimizer: 'adm' is not 'sgd' or 'adam'; did you mean 'adam'?",
        ),
        ("adam", "SGD", "main.yaml:7: condense.optimizer: 'SGD' is not 'sgd' or 'adam'; did you mean 'sgd'?"),
        ("[3, 6, 9]", "[3, x]", "main.yaml:8: condense.layer_index[1]: 'x' is not an integer"),
        ("[3, 6, 9]", "3", "main.yaml:8: condense.layer_index: 3 is not a list"),
        ("ipc: 5", "per_class: x", "main.yaml:5: condense.per_class: 'x' is not an integer or a list"),
        ("ipc: 5", "per_class: [1, x]", "main.yaml:5: condense.per_class[1]: 'x' is not an integer"),
        (
            "ipc: 5",
            "matches: [{los: mse, layer: 1}]",
            "main.yaml:5: condense.matches[0].los: unknown key; did you",
        ),
        ("ipc: 5", "matches: [{}]", "main.yaml:5: condense.matches[0].layer: required, and not given"),
        ("ipc: 5", "{alpha: 0, beta: 0", "main.yaml:6: not valid YAML: "),
        ("ipc: 5", "alpha: 0\n  beta: 0", "main.yaml:4: condense: alpha and beta must not both be 0"),
        ("[3, 6, 9]", "[3, 6", "main.yaml:9: not valid YAML: "),
        ("seed: 1", "seed: !!python/name:os.system", "main.yaml:1: not valid YAML: "),
        ("seed: 1", "seed: &a {b: *a}", "main.yaml:1: not valid YAML: "),
        ("seed: 1", "? [1]\n: 2", "main.yaml:1: not valid YAML: a key must be one word"),
        (GOOD, "", "main.yaml: holds no mapping"),
        (GOOD, "- 1", "main.yaml: holds no mapping"),
    ],
)
def test_each_fault_is_one_line_with_place_key_and_value(old: str, new: str, expected: str) -> None:
    (line,) = problems(GOOD.replace(old, new, 1))
    assert line.startswith(expected)


def test_all_problems_come_at_once() -> None:
    faults = {
        "seed: 1": "seed: one",
        "dataset: reuters": "data_dir: x",
        "ipc: 5": "ipc: -5",
        "lr: 1e-4": "lrr: 1e-4",
        "adam": "rmsprop",
    }
    text = GOOD
    for old, new in faults.items():
        text = text.replace(old, new)
    lines = problems(text, "condense.niter=many", "condense.x", "=3", "seed=[")
    assert len(lines) == len(faults) + 4
    assert sum(line.startswith("command line: ") for line in lines) == 4
    assert "command line: condense.niter: 'many' is not an integer" in lines


def test_top_level_and_section_overrides_merge_and_the_last_wins() -> None:
    config = load(GOOD, "seed=3", "condense={niter: 7}", "condense.niter=8", "condense.lr=5e-1", "seed=4").config
    assert (config.seed, config.condense.niter, config.condense.lr, config.condense.ipc) == (4, 8, 0.5, 5)


def test_options_and_overrides_keep_their_order() -> None:
    words = ["--ipc 5", "--no_tf32", "condense.ipc=6", "--sampling_net", "a.b=1"]
    meaning = ["condense.ipc=5", "tf32=false", "condense.ipc=6", "condense.sampling_net=true", "a.b=1"]
    for order in itertools.permutations(range(len(words))):
        found = command(*" ".join(words[i] for i in order).split())
        assert found.overrides == tuple(meaning[i] for i in order)


@pytest.mark.parametrize("swap", [*itertools.product([False, True], repeat=3)])
def test_spellings_of_an_option_are_equal(swap: tuple[bool, ...]) -> None:
    dash, joined, late = swap
    option = ["--load-path=x"] if dash and joined else ["--load_path=x"] if joined else ["--load_path", "x"]
    option = ["--load-path", "x"] if dash and not joined else option
    config = ["--config-path=c.yaml"] if dash else ["--config_path", "c.yaml"]
    words = [*option, "--dry-run", *config] if late else [*config, "--dry_run", *option]
    assert parse_command_line(words, "", OPTIONS) == parse_command_line(
        ["--config_path", "c.yaml", "--load_path", "x", "--dry_run"], "", OPTIONS
    )


def test_common_options(folder: Path) -> None:
    plain = command()
    assert (plain.gpu, plain.debug, plain.dry_run, plain.overwrite, plain.overrides) == (
        None,
        False,
        False,
        False,
        (),
    )
    assert plain.config_path == folder / "main.yaml"
    full = command("--gpu=0,2,3", "--debug", "--dry_run", "--overwrite", "--tf32", options=())
    assert (full.gpu, full.debug, full.dry_run, full.overwrite) == ("0,2,3", True, True, True)
    assert full.overrides == ("debug=true", "tf32=true")
    assert not command("--debug", "debug=false").debug


def test_option_reaches_the_configuration(folder: Path) -> None:
    here = "a: b #c/é"
    option = Option("data", "dataset.data_dir", "path", "the data")
    config = load(GOOD, *command("--ipc", "3", "--data", here, options=(OPTIONS[0], option)).overrides).config
    assert (config.condense.ipc, config.dataset.data_dir) == (3, folder / here)


def test_a_value_that_is_a_path_stands_for_other_overrides(folder: Path) -> None:
    loaded = ("condense.init=load", "condense.load_path={}")
    option = Option("init", "condense.init", "value", "how, or a file", or_path=loaded)
    for word, path in (
        ("./set", folder / "set"),
        ("a b/c: d #é.pth", folder / "a b/c: d #é.pth"),
        ("/x/s.pth", "/x/s.pth"),
    ):
        found = command("--init", word, options=(option,)).overrides
        assert found == ("condense.init=load", f"condense.load_path={json.dumps(str(path), ensure_ascii=False)}")
    assert command("--init=set.pth", options=(option,)).overrides[1].endswith('set.pth"')
    assert command("--init", "real", options=(option,)).overrides == ("condense.init=real",)
    kept = Option("load_path", "condense.load_path", "value", "a name")  # a plain value stays as it is
    assert command("--load_path", "a/b.pth", options=(kept,)).overrides == ("condense.load_path=a/b.pth",)


def test_value_may_be_negative_and_the_loader_judges_it() -> None:
    assert command("--ipc", "-5").overrides == ("condense.ipc=-5",)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ipcc", "5"], "--ipcc: unknown option; did you mean '--ipc'?"),
        (["--ip=5"], "--ip: unknown option; did you mean '--ipc'?"),
        (["--no-tf23"], "--no_tf23: unknown option; did you mean '--no_tf32'?"),
        (["--set=a=1"], "--set: unknown option"),
        (["-x"], "-x: unknown option"),
        (["niter"], "'niter': expected section.key=value"),
        (
            ["--init", "mx"],
            "argument --init: 'mx' is not one of random, noise, mix, load; did you mean 'mix'?",
        ),
        (["--ipc"], "argument --ipc: expected one argument"),
        (["--ipc", "--debug"], "argument --ipc: expected one argument"),
        (["--load_path="], "argument --load_path: the path is empty"),
        (["--load_path=~no-such-user/x"], "argument --load_path: '~no-such-user/x': the home folder"),
        (["--debug=true"], "argument --debug: ignored explicit argument 'true'"),
    ],
)
def test_faults_of_the_command_line_are_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(*words)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"command line: {expected}")


def test_config_path_is_required() -> None:
    with pytest.raises(ConfigError, match="--config_path"):
        parse_command_line([], "", OPTIONS)


def test_help_names_everything_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"], "Condense, 100% of it.", OPTIONS)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for word in (
        "Condense, 100% of it.",
        "--config_path",
        "--no_sampling_net",
        "{random,noise",
        "section.key=value",
    ):
        assert word in text
    assert "--set" not in text


def test_config_loads_without_torch() -> None:
    code = "import sys, config; sys.exit('torch' in sys.modules)"
    repository = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0


def test_a_key_in_upper_case_may_stand_apart_from_its_value() -> None:
    found = command("SOLVER.EPOCHS", "5", "--ipc", "3", "A.B_2=1", "M", "[1, 2]", "SEED", "-1", "--debug")
    assert found.overrides == ("SOLVER.EPOCHS=5", "condense.ipc=3", "A.B_2=1", "M=[1, 2]", "SEED=-1", "debug=true")
    for words in (["SOLVER.EPOCHS"], ["SOLVER.EPOCHS", "--debug"], ["solver.epochs", "5"]):
        with pytest.raises(ConfigError, match="expected section.key=value"):
            command(*words)


def test_several_files_have_overrides_of_their_own(folder: Path) -> None:
    (folder / "a b.yaml").touch()
    found = parse_command_line(["--cfg", "x.yaml A=[1,2] b.c=3", "d=1", "--cfg=a b.yaml"], "", OPTIONS)
    assert found.configs == ((folder / "x.yaml", ("A=[1,2]", "b.c=3")), (folder / "a b.yaml", ()))
    assert found.config_path == folder / "a b.yaml" and found.overrides == ("d=1",)
