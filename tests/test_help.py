"""Every program's --help is by one hand: what it does, commands, text, options."""

import contextlib
import inspect
import io
import re
import shlex
import sys
from functools import cache
from importlib import import_module

import pytest

from config.cli import Parser, positive
from utils.run_folder import REPOSITORY

PROGRAMS = sorted(
    file.relative_to(REPOSITORY).as_posix()
    for package in REPOSITORY.glob("*/__init__.py")
    for file in package.parent.glob("*.py")
    if "\ndef main(" in file.read_text() and "\nif __name__ ==" in file.read_text()
)
ENTRY = re.compile(r"^  (-\S.*?|\S+)(?:  +|\n {10,})(\S.*(?:\n {10,}\S.*)*)$", re.M)  # names and metavar, then help
every_program = pytest.mark.parametrize("program", PROGRAMS)


@cache
def help_of(program: str) -> str:
    """What --help prints, 120 columns wide."""
    module, said = import_module(program.removesuffix(".py").replace("/", ".")), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [program, "--help"])
        patch.setenv("COLUMNS", "120")
        try:
            status = module.main(["--help"]) if inspect.signature(module.main).parameters else module.main()
        except SystemExit as left:
            status = left.code
    assert not status
    return said.getvalue()


def parts(program: str) -> tuple[str, list[str], str]:
    """First line, commands and text of a help."""
    _, first, commands, text = re.split(r"\n\n", help_of(program), maxsplit=4)[:4]
    return first, commands.splitlines(), text


def entries(program: str) -> list[tuple[str, str]]:
    """Names with metavar, and help, of every option and other word; -h is argparse's own."""
    shown = re.split(r"^(?:options|positional arguments):\n", help_of(program), flags=re.M)[1:]
    found = [(names, " ".join(text.split())) for part in shown for names, text in ENTRY.findall(part.split("\n\n")[0])]
    assert len(found) == sum(len(re.findall(r"^  \S", part.split("\n\n")[0], re.M)) for part in shown), (
        "one has no help"
    )
    return [(names, text) for names, text in found if not names.startswith("-h")]


@every_program
def test_the_first_line_is_one_sentence_on_what_it_does(program: str) -> None:
    first, _, _ = parts(program)
    assert re.fullmatch(r"[A-Z][^\n]{20,118}\.", first)
    assert not {"python", program, program.split("/")[1]} & set(first.split())


@every_program
def test_then_come_commands_that_work_from_the_repository(program: str) -> None:
    _, commands, _ = parts(program)
    names = {program, program.removesuffix(".py").replace("/", ".")}
    assert any(
        names & set(shlex.split(line.replace("$(", " ").replace(")", " ").replace('"', " "), True)) for line in commands
    )
    for line in commands:
        assert re.match(r"    (?:[A-Z_]+=\S+ )*(?:python|torchrun|eval) ?\S", line) and len(line) <= 120, line
        files = re.findall(r"(?<![\w/.])(?:config|condense|distill_feat|kd)/[\w/.]+\.(?:yaml|txt|py)", line)
        assert all((REPOSITORY / file).is_file() for file in files), line


@every_program
def test_then_a_paragraph_of_whole_sentences(program: str) -> None:
    _, _, text = parts(program)
    assert re.fullmatch(r"(?s)\S.*\.", text) and max(map(len, text.splitlines())) <= 120


@every_program
def test_options_are_in_lower_case_without_a_full_stop(program: str) -> None:
    for names, text in entries(program):
        assert not re.match(r"[A-Z][a-z]+\b(?!-\d)", text) and not text.endswith("."), (names, text)


@every_program
def test_defaults_stand_last_in_brackets(program: str) -> None:
    for names, text in entries(program):
        assert "default" not in re.sub(r" \(default: [^()]+\)$", "", text), (names, text)


@every_program
def test_values_are_named_in_capitals_or_listed(program: str) -> None:
    for names, _ in entries(program):
        values = re.sub(r"--\w+,?|\{\S+\}|\.\.\.|[\[\] ]", " ", names) if names.startswith("-") else ""
        assert values.upper() == values, names


def test_one_thing_has_one_description_in_every_benchmark() -> None:
    for option in ("--device", "--rounds"):
        found = [re.sub(r" \(.*", "", text) for p in PROGRAMS for names, text in entries(p) if names.startswith(option)]
        assert len(found) > 5 and len(set(found)) == 1, option


def test_a_wrong_word_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("Do it.")
    parser.add_argument("--rounds", type=positive)
    for words in (["--round", "3"], ["--rounds", "0"], ["--rounds", "x\u00b2"]):
        with pytest.raises(SystemExit) as left:
            parser.parse_args(words)
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.startswith("command line: ") and said.count("\n") == 1
