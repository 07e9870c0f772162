"""YAML text to values that remember their file and line; `base:` followed to its end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from os.path import normpath, relpath
from pathlib import Path
from typing import Any

import yaml

from config.schema import ConfigError, nearest

COMMAND_LINE = "command line"
_TAG = "tag:yaml.org,2002:"
_MOST = 100_000  # values of a file, with those behind aliases
_BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")  # not on, off, yes, no: those are words (YAML 1.2)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_NUMBER = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Given:
    """One value and where it was written; a mapping holds further `Given`s."""

    value: Any
    place: str
    folder: Path  # where a relative path in it starts


class _Loader(yaml.SafeLoader):
    """A safe loader that knows 1e-4 as a number, refuses a key given twice and keeps every key's line."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] == _TAG + "null"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str | bytes, file: str, folder: Path, problems: list[str]) -> None:
        super().__init__(text)
        self.file, self.folder, self.problems = file, folder, problems
        self.trail: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping with a `Given` for every value."""
        first: dict[Any, int] = {}
        values: dict[Any, Given] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be one word", problem_mark=key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            self.trail.append(str(key))
            if key in first:
                dotted = ".".join(self.trail)
                again = f"{dotted}: given twice (first in line {first[key]})"
                self.problems.append(f"{self.place(line)}: {again}")
            first.setdefault(key, line)
            values[key] = Given(self.construct_object(value_node, deep=True), self.place(line), self.folder)
            self.trail.pop()
        return values

    def place(self, line: int) -> str:
        return self.file if self.file == COMMAND_LINE else f"{self.file}:{line}"


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = loader.construct_yaml_int(node)
    if value.bit_length() > 64:
        raise ValueError(f"an integer of {value.bit_length()} bits; 64 are the most")
    return value


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, those behind an alias wherever it stands."""
    if id(node) not in known:
        known[id(node)] = 1  # a node inside itself is refused later
        inner = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.CollectionNode):
            known[id(node)] += sum(_size(child, known) for child in inner)
    return known[id(node)]


_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_implicit_resolver(_TAG + "bool", _BOOLEAN, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _NUMBER, list("-+.0123456789"))


def shown(path: Path) -> str:
    """The path as messages name it: from the current folder, or in full where that is shorter."""
    return min(relpath(path), str(path), key=len)


def parse(text: str | bytes, file: str, folder: Path, problems: list[str]) -> Any:
    """The value of one YAML text (None if empty). ConfigError: not YAML."""
    try:
        loader = _Loader(text, file, folder, problems)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > _MOST:
            raise ValueError(f"more than {_MOST} values, those behind aliases counted")
        return None if node is None else loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and file != COMMAND_LINE else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{file}{line}: not valid YAML: {' '.join(reason.split())}") from error


def read_layers(
    path: Path, program_folder: Path, problems: list[str], place: str = "", above: Sequence[Path] = ()
) -> list[dict[str, Given]]:
    """A file's mapping after those of its `base` files, farthest first. ConfigError: unreadable, a cycle."""
    path = Path(normpath(path.absolute()))
    file, prefix = shown(path), f"{place}: base: " if place else ""
    if path in above:
        chain = " -> ".join(shown(step) for step in (*above, path))
        raise ConfigError(f"{prefix}the files are based on one another in a circle: {chain}")
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        near = sorted(entry.name for entry in path.parent.glob("*"))
        raise ConfigError(f"{prefix}{file}: no such file{nearest(path.name, near)}") from error
    except OSError as error:
        raise ConfigError(f"{prefix}{file}: cannot be read: {error.strerror}") from error
    tree = parse(text, file, program_folder, problems)
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: holds no mapping; write `key: value` lines")
    base = tree.pop("base", None)
    if base is None:
        return [tree]
    if not isinstance(base.value, str) or "\0" in base.value:
        raise ConfigError(f"{base.place}: base: the name of one YAML file is needed")
    above = (*above, path)
    return [*read_layers(path.parent / base.value, program_folder, problems, base.place, above), tree]


def read_override(text: str, problems: list[str]) -> dict[str, Given]:
    """`section.key=value` as a mapping. ConfigError: not of that form, or the value is not YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{COMMAND_LINE}: '{text}': expected section.key=value")
    folder = Path.cwd()
    try:
        given = Given(parse(value, COMMAND_LINE, folder, problems), COMMAND_LINE, folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace(COMMAND_LINE, f"{COMMAND_LINE}: {key}: '{value[:80]}'", 1)) from error
    for part in reversed(key.strip().split(".")[1:]):
        given = Given({part: given}, COMMAND_LINE, folder)
    return {key.strip().split(".")[0]: given}
