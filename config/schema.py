"""What a configuration is made of: sections, and paths that know where they start."""

import difflib
import os
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """Something the user can put right: value, limit and remedy, one line per problem."""


class Section(BaseModel):
    """A group of settings: frozen, of exact types, with no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class _Mark(Enum):
    LOCAL = "a file or folder"
    MODEL = "a folder if it looks like one, else a model's name"


LocalPath = Annotated[Path, _Mark.LOCAL]
ModelPath = Annotated[str, _Mark.MODEL]


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like this one, or nothing."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, n=1)
    return f"; did you mean '{names[found[0]]}'?" if found else ""


def absolute(path: str | Path, folder: Path) -> Path:
    """The path with `~` expanded, from `folder` if relative, without `..`. ConfigError: no such user, a NUL in it."""
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: no path has a NUL character")
    try:
        return Path(os.path.normpath(folder.absolute() / Path(path).expanduser()))
    except RuntimeError as error:
        raise ConfigError(f"'{path}': the home folder behind ~ is not known; write the path out") from error


def convert(kind: Any, value: Any, folder: Path) -> Any:
    """A YAML value in the types a strict `kind` accepts: tuples for lists, absolute paths for texts."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated and _Mark.LOCAL in parts:
        return absolute(value, folder) if value and isinstance(value, str | Path) else value
    if origin is Annotated and _Mark.MODEL in parts:
        local = isinstance(value, str) and value.startswith((".", "/", "~"))
        return str(absolute(value, folder)) if local else value
    if origin is Annotated:
        return convert(parts[0], value, folder)
    if origin in (Union, UnionType):
        if any(get_origin(part) is Literal and value in get_args(part) for part in parts):
            return value
        for part in parts:
            value = convert(part, value, folder)
        return value
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if isinstance(value, list | tuple) and origin in (tuple, list):
        kinds = parts if origin is tuple and parts[-1] is not Ellipsis else parts[:1] * len(value)
        items = [convert(part, item, folder) for part, item in zip(kinds, value, strict=False)]
        return origin([*items, *value[len(items) :]])
    if isinstance(value, dict) and origin is dict:
        return {key: convert(parts[1], item, folder) for key, item in value.items()}
    if isinstance(value, dict) and is_section(kind):
        fields = kind.model_fields
        return {
            key: convert(fields[key].rebuild_annotation(), item, folder) if key in fields else item
            for key, item in value.items()
        }
    return value


def is_section(kind: Any) -> bool:
    """Whether an annotation is a Section class itself."""
    return isinstance(kind, type) and issubclass(kind, Section)


def sections_in(kind: Any) -> Iterator[type[Section]]:
    """Every Section class that an annotation speaks of, at any depth."""
    if is_section(kind):
        yield kind
        for field in kind.model_fields.values():
            yield from sections_in(field.annotation)
    for part in get_args(kind):
        yield from sections_in(part)


def as_section(kind: Any) -> tuple[type[Section] | None, bool]:
    """(S, whether None is allowed) for an annotation `S` or `S | None`; (None, False) for any other."""
    if is_section(kind):
        return kind, False
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType) and len(parts) == 2 and type(None) in parts:
        other = next(part for part in parts if part is not type(None))
        return (other, True) if is_section(other) else (None, False)
    return None, False
