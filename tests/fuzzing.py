"""Hostile files, and what a reader may do with them: return, or say one line; run nothing, take little memory."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import ConfigError

T = TypeVar("T")
MANY = 3000


def examples(few: int, many: int = MANY) -> pytest.MarkDecorator:
    """Parametrise `count`: few examples, always the same, or in the slow suite many, each time others."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])


def hold(count: int, claim: Callable[[T], object], hostile: st.SearchStrategy[T]) -> None:
    rules = settings(
        max_examples=count, derandomize=count < 1000, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def judge(case: T) -> None:
        claim(case)

    rules(given(hostile)(judge))()


def read_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except ConfigError as error:
        assert str(error).strip() and "\n" not in str(error)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Cut off, overwritten, lengthened; seldom nothing of it."""
    if draw(st.integers(0, 9)) == 9:
        return draw(st.binary(max_size=100))
    found = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(["cut", "write", "insert", "remove"]))
        if kind == "cut":
            del found[place:]
        elif kind == "insert":
            found[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "remove":
            del found[place : place + draw(st.integers(1, 16))]
        else:
            new = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, b"\0" * 8, b"\x7f"])))
            found[place : place + len(new)] = new
    return bytes(found)


class Deed:
    """Pickles as a call that leaves a mark."""

    def __init__(self, call: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def deeds(mark: Path) -> st.SearchStrategy[Deed]:
    """Calls that make a folder `mark`."""
    code = f"__import__('os').mkdir({str(mark)!r})"
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (os.mkdir, (str(mark),)), (os.system, (f"mkdir {mark}",)), (eval, (code,)), (exec, (code,)),
        (subprocess.call, (["mkdir", str(mark)],)), (Path.mkdir, (mark,)), (getattr, (os, "mkdir")),
    ]  # fmt: skip
    return st.sampled_from(calls[:-1]).map(Deed)


def wrapped(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Somewhere within lists, tuples and the mappings that readers look for."""
    keys = st.sampled_from(["data", "targets", "fine_labels", "net", "w", "meta"])

    def more(part: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(part.map(lambda v: [v, 1]), part.map(lambda v: (v,)), st.dictionaries(keys, part, min_size=1))

    return st.recursive(inner, more, max_leaves=3)


def resident(name: str) -> float:
    """MB that the process has (VmRSS), or had at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """What the block takes, at its peak, in memory that is really there."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < megabytes
