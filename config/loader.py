"""From YAML files and overrides to a checked configuration that knows where each value came from."""

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from config.document import Given, read_layers, read_override, shown
from config.schema import (
    ConfigError,
    Section,
    as_section,
    convert,
    nearest,
    sections_in,
)

T = TypeVar("T", bound=Section)
S = TypeVar("S", bound=Section, covariant=True)

_WORDS = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "is_instance_of": "a path",
    "list_type": "a list",
    "model_type": "a mapping",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list",
}


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """A configuration, and for every leaf's dotted key the place its value came from."""

    config: S
    sources: dict[str, str]


def add_args_from_yaml(schema: type[T], path: Path, overrides: Sequence[str], program_folder: Path) -> Resolved[T]:
    """The checked configuration of a YAML file: command line over file over its bases over defaults.

    Relative paths in files and defaults start at `program_folder`, those of overrides at the current folder.
    ConfigError: every problem found, one line each.
    """
    problems: list[str] = []
    layers: list[Mapping[str, Given]] = [*read_layers(Path(path), program_folder, problems)]
    for text in overrides:
        try:
            layers.append(read_override(text, problems))
        except ConfigError as error:
            problems.append(str(error))
    builder = _Builder(schema, shown(Path(path).absolute()), program_folder, problems)
    config = builder.section(schema, layers, "", builder.file)
    if config is None or problems:  # a key or value may have line breaks in it
        raise ConfigError("\n".join(dict.fromkeys(" ".join(problem.splitlines()) for problem in problems)))
    return Resolved(config, builder.sources)


def flatten(config: Section) -> dict[str, object]:
    """Leaf values by dotted key, in types that JSON knows; only nested sections are opened."""
    plain, flat = config.model_dump(mode="json"), dict[str, object]()
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            flat.update({f"{name}.{key}": leaf for key, leaf in flatten(value).items()})
        else:
            flat[name] = plain[name]
    return flat


def named(cfg: Section, prefixes: Iterable[str]) -> dict[str, object]:
    """The resolved values whose dotted keys begin with one of the prefixes."""
    return {key: value for key, value in flatten(cfg).items() if key.startswith(tuple(prefixes))}


def nested(cfg: Section) -> dict[str, object]:
    """The resolved configuration as it stands in args.log, which --config_path reads again."""
    tree: dict[str, Any] = {}
    for key, value in flatten(cfg).items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


class PythonSection(Section):
    """A section that Python code constructs too. Raises ConfigError there: one line per problem, naming the key."""

    def __init__(self, **values: Any) -> None:  # as pydantic has it
        schema, problems = type(self), list[str]()
        builder = _Builder(schema, schema.__name__, Path(), problems)
        for key in [key for key in values if key not in schema.model_fields]:
            builder.unknown(schema.__name__, key, key, schema.model_fields)
        known = {
            key: convert(field.rebuild_annotation(), values[key], Path())
            for key, field in schema.model_fields.items()
            if key in values
        }
        try:
            super().__init__(**known)
        except ValidationError as error:
            builder.refused(schema, known, error, "", schema.__name__, ())
            problems.extend(
                f"{schema.__name__}: {detail['loc'][0]}: required, and not given"
                for detail in error.errors()
                if detail["type"] == "missing" and len(detail["loc"]) == 1
            )
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))


class _Builder:
    """Builds sections from the inside out and notes every problem on the way."""

    def __init__(self, root: type[Section], file: str, program_folder: Path, problems: list[str]) -> None:
        self.file, self.program_folder, self.problems = file, program_folder, problems
        self.sources: dict[str, str] = {}
        self.homes: dict[str, list[str]] = {}  # key -> where it is known
        self.note_homes(root, "")

    def note_homes(self, schema: type[Section], trail: str) -> None:
        for name, field in schema.model_fields.items():
            self.homes.setdefault(name, []).append(f"in section '{trail}'" if trail else "at the top level")
            inner, _ = as_section(field.annotation)
            if inner:
                self.note_homes(inner, _dotted(trail, name))

    def section(self, schema: type[T], layers: Sequence[Mapping[str, Given]], trail: str, place: str) -> T | None:
        """The section whose layers, weakest first, these are; None if something in it is wrong."""
        start = len(self.problems)
        meant = set()
        for layer in layers:
            for key in layer:
                if key not in schema.model_fields:
                    meant.add(self.unknown(layer[key].place, _dotted(trail, key), str(key), schema.model_fields))
        values: dict[str, Any] = {}
        wrong: set[str] = set()
        for name, field in schema.model_fields.items():
            key = _dotted(trail, name)
            given = [*self.default(field), *(layer[name] for layer in layers if name in layer)]
            inner, optional = as_section(field.annotation)
            if not given and f"; did you mean '{name}'?" in meant:
                wrong.add(name)  # its misspelling is noted already
                continue
            try:
                if inner:
                    values[name] = self.inner(inner, optional, given, key, place)
                else:
                    values[name] = self.leaf(field, given, key)
            except ConfigError as error:
                wrong.add(name)
                self.problems.extend(filter(None, [str(error)]))
        try:
            built = schema.model_validate(values)
        except ValidationError as error:
            self.refused(schema, values, error, trail, place, wrong)
            return None
        return built if len(self.problems) == start else None

    def refused(
        self, schema: type[Section], values: Mapping[str, Any], error: ValidationError, trail: str, place: str,
        wrong: Container[str],
    ) -> None:  # fmt: skip
        """Note what pydantic says of a section's values, but for the fields that are known to be wrong."""
        for loc, group in groupby(error.errors(include_url=False), key=lambda detail: detail["loc"][:1]):
            name = str(loc[0]) if loc else ""
            if name in values and name not in wrong:
                field, key = schema.model_fields[name], _dotted(trail, name)
                self.invalid(self.sources.get(key, place), key, field, values[name], list(group))
            elif not loc and not wrong:
                where = f"{place}: {trail}: " if trail else f"{place}: "
                self.problems.extend(where + _reason(detail) for detail in group)

    def default(self, field: FieldInfo) -> list[Given]:
        if field.is_required():
            return []
        return [Given(field.get_default(call_default_factory=True), "default", self.program_folder)]

    def leaf(self, field: FieldInfo, given: Sequence[Given], key: str) -> Any:
        """The strongest value, converted. ConfigError: there is none, or its path cannot be resolved."""
        if not given:
            raise ConfigError(f"{self.file}: {key}: required, and not given")
        last = given[-1]
        self.sources[key] = last.place
        try:
            return convert(field.rebuild_annotation(), _plain(last.value), last.folder)
        except ConfigError as error:
            raise ConfigError(f"{last.place}: {key}: {error}") from error

    def inner(self, schema: type[T], optional: bool, given: Sequence[Given], key: str, place: str) -> T | None:
        """The nested section, merged key by key. ConfigError (empty if already noted): it cannot be built."""
        layers: list[Mapping[str, Given]] = []
        absent = False
        for one in given:
            value = one.value
            place = place if one.place == "default" else one.place
            if isinstance(value, Section):
                fields = type(value).model_fields
                value = {name: Given(getattr(value, name), one.place, one.folder) for name in fields}
            if value is None:  # `section:` with nothing below it
                absent, layers = (True, []) if optional else (absent, layers)
            elif isinstance(value, dict):
                absent = False
                layers.append(value)
            else:
                keys = ", ".join(schema.model_fields)
                raise ConfigError(f"{one.place}: {key}: {_show(value)} is not a section; its keys are {keys}")
        if absent:
            self.sources[key] = given[-1].place
            return None
        built = self.section(schema, layers, key, place)
        if built is None:
            raise ConfigError
        return built

    def unknown(self, place: str, dotted: str, key: str, known: Iterable[str]) -> str:
        """Note an unknown key; returns the remedy."""
        homes = self.homes.get(key)
        hint = f"; known {' and '.join(homes)}" if homes else nearest(key, known)
        self.problems.append(f"{place}: {dotted}: unknown key{hint or '; known: ' + ', '.join(known)}")
        return hint

    def invalid(self, place: str, key: str, field: FieldInfo, value: Any, details: list[ErrorDetails]) -> None:
        """Note what pydantic says of one field: for a union only what the closest of its members says."""
        depth = max(len(_path(value, detail)) for detail in details)
        branched = any(len(detail["loc"]) - 1 > len(_path(value, detail)) for detail in details)
        if branched:
            details = [detail for detail in details if len(_path(value, detail)) == depth]
            details = [detail for detail in details if detail["type"] not in _WORDS][:1] or details
        for path, group in groupby(details, key=lambda detail: _path(value, detail)):
            together = list(group)
            where = key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
            if together[0]["type"] == "extra_forbidden":
                sections = sections_in(field.annotation)
                known = dict.fromkeys(name for section in sections for name in section.model_fields)
                self.unknown(place, where, str(path[-1]), known)
            elif all(detail["type"] in _WORDS for detail in together):
                words = " or ".join(dict.fromkeys(_WORDS[detail["type"]] for detail in together))
                self.problems.append(f"{place}: {where}: {_show(together[0]['input'])} is not {words}")
            else:
                self.problems.extend(f"{place}: {where}: {_reason(detail)}" for detail in together)


def _path(value: Any, detail: ErrorDetails) -> tuple[int | str, ...]:
    """The steps from a field down to the faulty item, without the union members that pydantic names."""
    steps: list[int | str] = []
    for step in detail["loc"][1:]:
        inside = isinstance(value, dict) and step in value
        if inside or (isinstance(value, tuple | list) and isinstance(step, int) and step < len(value)):
            value = value[step]
            steps.append(step)
    if detail["type"] == "missing":
        steps.append(detail["loc"][-1])
    return tuple(steps)


def _reason(detail: ErrorDetails) -> str:
    """A pydantic error in one plain line that names the value."""
    value, context = _show(detail["input"]), detail.get("ctx", {})
    if detail["type"] == "missing":
        return "required, and not given"
    if detail["type"] == "literal_error":
        near = nearest(str(detail["input"]), re.findall("'([^']*)'", context["expected"]))
        return f"{value} is not {context['expected']}{near}"
    if "error" in context:
        reason = " ".join(str(context["error"]).split())
        return reason if value in reason or isinstance(detail["input"], dict) else f"{value}: {reason}"
    if detail["msg"].startswith("Input should"):
        return f"{value} {detail['msg'].removeprefix('Input ')}"
    return f"{value}: {detail['msg']}"


def _plain(value: Any) -> Any:
    if isinstance(value, Given):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(trail: str, name: object) -> str:
    return f"{trail}.{name}" if trail else str(name)
