"""Files of others, read without trust: damage becomes one line, nothing runs, no size is believed."""

import io
import pickle
import pickletools
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError

MATRIX, PACKED = 14, 15  # types of MATLAB's elements, and of its numbers
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
LARGEST = 2**30  # bytes of a part in memory, whatever a file says of itself
DAMAGE = (  # what parsers raise on bytes that are not theirs
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError, RuntimeError,
    pickle.UnpicklingError, zlib.error, struct.error,
)  # fmt: skip


@contextmanager
def reading(path: Path, kind: str, *more: type[Exception]) -> Iterator[None]:
    """Damage of any sort, and the exceptions `more`, become a ConfigError that names the file."""
    expected: tuple[type[Exception], ...] = (*DAMAGE, *more)
    try:
        yield
    except ConfigError:
        raise
    except expected as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not {kind} ({reason[:120]}): fetch it again or remove it") from error


class Pixels:
    """Stands for NumPy's array in a pickle: of bytes only, no more of them than the file has."""

    found = np.empty((0, 0), np.uint8)

    def __init__(self, *parts: object) -> None:
        """Takes any words, as constructors of arrays do."""

    def __setstate__(self, state: Any) -> None:
        """NumPy's (version, shape, type, column order, content). Raises ValueError where they do not fit."""
        _, shape, kind, columns, content = state
        if kind != "u1":
            raise ValueError("holds an array of another type than bytes")
        raw = content.encode("latin1") if isinstance(content, str) else content
        self.found = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if columns else "C")


class Code(str):
    """Stands for NumPy's type in a pickle: its letters."""

    def __new__(cls, code: str, *more: object) -> "Code":
        """Whether it is to be copied does not matter."""
        return super().__new__(cls, code)

    def __setstate__(self, state: object) -> None:
        """The order of a byte's bytes does not matter."""


def latin(text: str, encoding: str) -> bytes:
    """Stands for the encoder by which old pickles hold bytes. Raises ValueError for another encoding."""
    if encoding != "latin1":
        raise ValueError(f"holds text in {encoding!r}")
    return text.encode("latin1")


class SafeUnpickler(pickle.Unpickler):
    """Reads arrays of bytes and plain values; nothing of NumPy's, or of anybody else's, runs."""

    KNOWN = {
        "numpy.core.multiarray _reconstruct": Pixels, "numpy._core.multiarray _reconstruct": Pixels,
        "numpy ndarray": Pixels, "numpy dtype": Code, "_codecs encode": latin,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Only what stands for the parts of an array."""
        if f"{module} {name}" not in self.KNOWN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return self.KNOWN[f"{module} {name}"]


def plain(values: object, kind: type) -> list[Any]:
    """A list of values of that kind. Raises ValueError for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"holds no list of {kind.__name__}")
    return values


def unpickle(path: Path) -> dict[str, Any]:
    """One of CIFAR's files. Raises what a damaged pickle may."""
    raw = path.read_bytes()
    for number, (opcode, word, _) in enumerate(pickletools.genops(raw)):
        # A place in the unpickler's memory is made at once, with all before it.
        if "PUT" in opcode.name and isinstance(word, int) and not 0 <= word <= number:
            raise ValueError(f"names place {word} in step {number}")
    value = SafeUnpickler(io.BytesIO(raw), encoding="latin1").load()
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}")
    return value


def mat_arrays(raw: bytes, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Arrays of numbers by name in a MATLAB 5 file, little-endian. Raises what damaged bytes may."""
    if raw[124:128] != b"\0\1IM":
        raise ValueError("no MATLAB 5 file")
    for kind, content in mat_elements(memoryview(raw)[128:], unpack=True):
        if kind == MATRIX:
            _, (_, shape), (_, name), (number, values), *_ = mat_elements(content)
            if (text := bytes(name).decode("ascii")) in names:
                found = np.frombuffer(values, NUMBERS[number])
                yield text, found.reshape(np.frombuffer(shape, "<i4"), order="F")


def mat_elements(raw: memoryview, unpack: bool = False) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of the elements that follow each other; packed ones, if asked for, by what is in them."""
    place = 0
    while place < len(raw):
        kind, size = struct.unpack_from("<II", raw, place)
        begin = place + 8
        if kind >> 16:  # a short one: both in one word, its content in the other
            kind, size, begin = kind & 0xFFFF, kind >> 16, place + 4
        if begin + size > len(raw):
            raise ValueError("ends early")
        content = raw[begin : begin + size]
        place = begin + size
        if kind == PACKED and unpack:
            unpacker = zlib.decompressobj()
            whole = unpacker.decompress(content, LARGEST)
            if not unpacker.eof:
                raise ValueError(f"ends early, or has more than {LARGEST} bytes")
            yield from mat_elements(memoryview(whole))
        else:
            place += -place % 8
            yield kind, content
