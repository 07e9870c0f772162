"""Completion in real bash, as it calls a completion function and as a person at a terminal meets it."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from config.cli import command_parser, options_of
from config.document import read_override
from config.schema import sections_in
from kd.kd_config import OPTIONS, KdConfig
from scripts import completion
from utils.run_folder import REPOSITORY

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="bash is absent")
TRAIN, TEXT = "kd/train.py", "condense/condense_script_text.py"
WORDBREAKS = " \t\n\"'><=;|&(:"  # bash's own


@pytest.fixture(scope="module")
def words() -> dict[str, list[str]]:
    return {name: completion.words_of(program) for name, program in completion.programs().items()}


@pytest.fixture(scope="module")
def script(words: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "script.sh"
    file.write_text(completion.script(words))
    return file


def replies(script: Path, line: str, folder: Path = REPOSITORY, breaks: str = WORDBREAKS, before: str = "") -> set[str]:
    """COMPREPLY for a line with the cursor at its end; words as bash splits it: runs of = or : are words."""
    parts = re.findall(r"[=:]+|[^\s=:]+" if "=" in breaks else r"\S+", line) + [""] * line[-1].isspace()
    current = "" if parts[-1] in ("=", ":") else parts[-1]
    code = (
        f'{before}\nsource "$1"; COMP_LINE=$2 COMP_POINT=${{#2}} COMP_WORDBREAKS=$3 current=$4; shift 4\n'
        'COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); compopt() { :; }\n'
        '_distill_lab "$1" "$current" "${COMP_WORDS[COMP_CWORD - 1]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", code, "bash", str(script), line, breaks, current, *parts]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return set(filter(None, done.stdout.split("\n")))


def test_every_program_is_known_and_every_word_survives_the_shell(words: dict[str, list[str]]) -> None:
    mains = {file for file in REPOSITORY.glob("*/*.py") if "\ndef main(" in file.read_text()}
    assert {str(file.relative_to(REPOSITORY)) for file in mains} == words.keys()
    assert [word for some in words.values() for word in some if not re.fullmatch(r"[\w./=+-]+", word)] == []


def test_options_are_those_of_help(script: Path) -> None:
    shown = {name for name in options_of(command_parser("", OPTIONS)) if name.startswith("--")}
    assert replies(script, f"python {TRAIN} --") == shown
    assert replies(script, f"python {TRAIN} --qu") == {"--quick"}


@pytest.mark.parametrize(
    "start",
    [
        f"python {TRAIN}",
        f"python3 -u ./{TRAIN}",
        f"python {REPOSITORY}/scripts/../{TRAIN}",
        "python -m kd.train",
        f"torchrun --nproc_per_node=2 {TRAIN}",
        f"torchrun --rdzv_endpoint=host:29500 --nproc_per_node 2 {TRAIN} --cfg x.yaml SEED=1",
        f"python -m torch.distributed.run --nproc_per_node=2 {TRAIN}",
        f"python {TRAIN} other.py",
    ],
)
def test_a_key_is_completed_however_the_program_is_started(script: Path, start: str) -> None:
    assert replies(script, f"{start} SDD.RED") == {"SDD.REDUCTION="}


def test_a_program_is_known_from_any_folder(script: Path, tmp_path: Path) -> None:
    assert replies(script, "python train.py --qu", REPOSITORY / "kd") == {"--quick"}
    (tmp_path / "kd").mkdir()
    (tmp_path / "kd" / "train.py").touch()
    assert replies(script, "python kd/train.py --qu", tmp_path) == set()


def test_keys_are_those_of_the_schema(script: Path) -> None:
    sections = {f"{name}." for name in KdConfig.model_fields if name.isupper() and name not in ("M", "SEED", "QUICK")}
    found = replies(script, f"python {TRAIN} ")
    assert {key.split(".")[0] + "." for key in found if "." in key} == sections - {"COMPAT."}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("SDD.REDUCTION=", {"mean", "sum", "group_mean"}),
        ("SDD.REDUCTION=gr", {"group_mean"}),
        ("SDD.REDUCTION ", {"mean", "sum", "group_mean"}),
        ("QUICK=t", {"true"}),
        ("SOLVER.EPOCHS=", set()),
        ("--seed ", set()),
    ],
)
def test_values_of_a_key_that_can_be_listed_are_completed(script: Path, typed: str, expected: set[str]) -> None:
    assert replies(script, f"python {TRAIN} {typed}") == expected


def test_choices_of_an_option_are_completed_with_and_without_equals(script: Path) -> None:
    for typed in ("--init ", "--init="):
        assert replies(script, f"python {TEXT} {typed}") == {"random", "noise", "mix", "load"}
        assert replies(script, f"python {TEXT} {typed}m") == {"mix"}
    assert replies(script, "python -m scripts.table ") == {"collect", "write", "check"}
    assert replies(script, "python -m scripts.bench_scale --methods n") == {"ncfm"}


def test_where_bash_does_not_split_at_equals_the_whole_word_is_replaced(script: Path) -> None:
    breaks = WORDBREAKS.replace("=", "")
    assert replies(script, f"python {TEXT} --init=m", breaks=breaks) == {"--init=mix"}
    assert replies(script, f"python {TRAIN} SDD.BINS=e", breaks=breaks) == {"SDD.BINS=exact"}


def test_after_the_config_option_come_folders_and_yaml_files(script: Path, tmp_path: Path) -> None:
    for name in ("one.yaml", "two.yml", "notes.txt", "run/args.log", "run/print.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for typed in ("--config_path ", "--config_path=", "--cfg ", "--cfg="):
        line = f"python {REPOSITORY / TEXT} {typed}"
        assert replies(script, line, tmp_path) == {"one.yaml", "two.yml", "run"}
        assert replies(script, line + "run/", tmp_path) == {"run/args.log"}


@pytest.mark.parametrize(
    "line", ["python other.py ", "python other.py --", "python -c x kd/train.py --", "torchrun --n"]
)
def test_anything_else_is_left_to_bash(script: Path, line: str) -> None:
    assert replies(script, line) == set()
    assert replies(script, line, before="old() { COMPREPLY=(old); }; complete -F old python torchrun") == {"old"}


def test_modules_are_offered_beside_those_of_an_earlier_completion(script: Path) -> None:
    before = "old() { COMPREPLY=(json.tool); }; complete -F old python"
    assert replies(script, "python -m kd.t", before=before) == {"json.tool", "kd.train"}


def test_every_listed_value_is_one_that_its_key_takes() -> None:
    for program in completion.programs().values():
        for word in filter(re.compile(r"[^-].*=.+").fullmatch, completion.words_of(program)):
            if hasattr(program, "TAKES"):
                kind, given = program.TAKES[0], read_override(word, [])
                for name in word.partition("=")[0].split("."):
                    kind = next(iter(sections_in(kind))).model_fields[name].annotation
                    given = given[name].value
                TypeAdapter(kind).validate_python(given, strict=True)


def test_at_a_terminal_words_are_finished_and_followed_as_bash_does(script: Path, tmp_path: Path) -> None:
    (tmp_path / "main.yaml").touch()
    (tmp_path / "plain.txt").touch()
    train, text = REPOSITORY / TRAIN, REPOSITORY / TEXT
    lines = {
        f"python {train} --cfg m\t": f"python {train} --cfg main.yaml ",
        f"python {train} --cfg=m\t": f"python {train} --cfg=main.yaml ",
        f"python {train} SDD.RED\tgr\t": f"python {train} SDD.REDUCTION=group_mean ",
        f"python {text} --ini\tm\t": f"python {text} --init mix ",
        "python other.py pl\t": "python other.py plain.txt ",
    }
    shell, terminal = pty.fork()
    if not shell:
        os.chdir(tmp_path)
        os.environ.update(TERM="dumb", INPUTRC="/dev/null", PS1="")
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    said = b""
    os.write(terminal, f"stty cols 500; source {script}; python() {{ :; }}\n".encode())
    for line in lines:
        os.write(terminal, f"{line}\n".encode())
    os.write(terminal, b"exit\n")
    end = time.monotonic() + 60
    while time.monotonic() < end and select.select([terminal], [], [], 30)[0]:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # it has left
            break
    os.close(terminal)
    os.waitpid(shell, 0)
    for line in lines.values():
        assert line in said.decode(), said.decode()
