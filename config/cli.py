"""One grammar for every program: named options and `section.key=value`, in any order; the last one wins."""

import argparse
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from config.document import shown
from config.schema import ConfigError, absolute, nearest

GRAMMAR = """\
overrides:
  section.key=value sets any key of the configuration; the value is read as YAML:
      condense.niter=50  network.layer_index=[3,6]  seed=3
  SECTION.KEY value is the same for keys in upper case:  SOLVER.EPOCHS 5
  The command line is stronger than the file, the file than its base, the base than the defaults.
  Options and overrides may be mixed; the last one wins. - and _ are the same in option names.
  Relative paths on the command line start at the current folder, those in a file at the program's folder."""


@dataclass(frozen=True)
class Option:
    """A named option that is short for a configuration key, or for several where `expands` has the value."""

    name: str
    key: str
    kind: Literal["value", "path", "flag"]
    help: str
    choices: tuple[str, ...] = ()
    expands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # value -> overrides
    or_path: tuple[str, ...] = ()  # overrides, with {} for the path, of a value that is a path: has a / or ends in .pth


@dataclass(frozen=True)
class CommandLine:
    """What a program was asked to do; `overrides` keep the order of the command line."""

    configs: tuple[tuple[Path, tuple[str, ...]], ...]  # every file, with overrides of its own, which win
    gpu: str | None
    debug: bool
    dry_run: bool
    overwrite: bool
    overrides: tuple[str, ...]

    @property
    def config_path(self) -> Path:
        """The file; of several, the last."""
        return self.configs[-1][0]


UPPER = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)*")  # a key that may stand apart from its value
TF32 = Option("tf32", "tf32", "flag", "TensorFloat-32 in matrix products (short for the key tf32)")


class Parser(argparse.ArgumentParser):
    """The frame of every command line: a docstring as help, options in full, a mistake as one line and status 2."""

    def __init__(self, doc: str | None, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            usage=usage, description=(doc or "").strip(), epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """The one line."""
        self.exit(2, f"command line: {message}\n")


class _Configured(Parser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def positive(text: str) -> int:
    """An option's `type`: a whole number of 1 or more. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def command_parser(doc: str, options: Sequence[Option], default_config: Path | None = None) -> Parser:
    """What reads the command line of a program with a configuration; overrides come to it as --set."""
    parser = _Configured(doc, "%(prog)s --config_path FILE [options] [section.key=value ...]", GRAMMAR)
    add = parser.add_argument
    text = "YAML file of the experiment" + (f" (default: {shown(default_config)})" if default_config else "")
    place = partial(add, dest="configs", action="append", type=_config, metavar="FILE")
    place("--config_path", "--cfg", required=not default_config, help=text)
    add("--gpu", metavar="LIST", help='GPUs to use, as in "0,2,3"')
    add(
        "--debug",
        dest="overrides",
        action="append_const",
        const="debug=true",
        help="few classes, a log line an iteration, tracebacks",
    )
    add("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    add("--overwrite", action="store_true", help="start anew in a run folder that is already there")
    add("--set", dest="overrides", action="append", default=[], help=argparse.SUPPRESS)
    for option in (TF32, *options):
        name, text = "--" + option.name.replace("-", "_"), option.help.replace("%", "%%")
        if option.kind == "flag":
            add(name, dest="overrides", action="append_const", const=f"{option.key}=true", help=text)
            no, text = f"--no_{name[2:]}", f"not {name}"
            add(no, dest="overrides", action="append_const", const=f"{option.key}=false", help=text)
        else:
            metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.kind.upper()
            read = partial(_override, option)
            add(name, dest="overrides", action="extend", type=read, metavar=metavar, help=text)
    parser.set_defaults(overrides=[])
    return parser


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What --help shows, by every name: options by theirs, other words by their dest."""
    found = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    return {name: action for action in found for name in action.option_strings or [action.dest]}


def parse_command_line(
    argv: Sequence[str], doc: str, options: Sequence[Option], default_config: Path | None = None
) -> CommandLine:
    """What `argv` (without the program's name) asks for. ConfigError: what cannot be understood."""
    parser = command_parser(doc, options, default_config)
    flags = {name for name, action in options_of(parser).items() if action.nargs == 0}
    valued = options_of(parser).keys() - flags
    found = parser.parse_args(_in_order(argv, flags, valued))
    overrides = tuple(found.overrides)
    debug = [text for text in overrides if text.startswith("debug=")][-1:] == ["debug=true"]
    configs = tuple(found.configs or [(absolute(default_config or "", Path.cwd()), ())])
    return CommandLine(configs, found.gpu, debug, found.dry_run, found.overwrite, overrides)


def _config(text: str) -> tuple[Path, tuple[str, ...]]:
    """A file, or a file with overrides of its own as in "FILE M=[1,2] SEED=1"."""
    words = [text] if os.access(text, os.F_OK) else shlex.split(text) or [""]
    return absolute(words[0], Path.cwd()), tuple(words[1:])


def _override(option: Option, text: str) -> tuple[str, ...]:
    """The overrides that an option with this value stands for."""
    if option.choices and text not in option.choices:
        hint = nearest(text, option.choices)
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(option.choices)}{hint}")
    path = bool(option.or_path) and ("/" in text or text.endswith(".pth"))
    if option.kind == "path" or path:
        if not text:
            raise argparse.ArgumentTypeError("the path is empty")
        try:
            text = json.dumps(str(absolute(text, Path.cwd())), ensure_ascii=False)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if path:
        return tuple(override.replace("{}", text) for override in option.or_path)
    return option.expands.get(text, (f"{option.key}={text}",))


def _in_order(argv: Sequence[str], flags: set[str], valued: set[str]) -> list[str]:
    """The words with every option in one spelling and overrides as options: argparse keeps their order."""
    words, problems, rest = list[str](), list[str](), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if UPPER.fullmatch(word) and rest and not rest[0].startswith("--"):
                word = f"{word}={rest.pop(0)}"
            key, equals, _ = word.partition("=")
            if not equals or not key:
                problems.append(f"command line: '{word}': expected section.key=value or an option")
            words.append(f"--set={word}")
            continue
        name, equals, value = word.partition("=")
        name = name[:2] + name[2:].replace("-", "_")
        follows = not equals and bool(rest) and not rest[0].startswith("--")
        if name not in flags | valued:
            hint = nearest(name, flags | valued) or "; see --help"
            problems.append(f"command line: {name}: unknown option{hint}")
            if follows and "=" not in rest[0]:
                rest.pop(0)  # most likely its value
        elif name in valued and follows:
            words.append(f"{name}={rest.pop(0)}")
        else:
            words.append(name + equals + value)
    if problems and not {"-h", "--help"} & set(words):
        raise ConfigError("\n".join(" ".join(problem.splitlines()) for problem in problems))
    return words
