"""Named random streams: a draw depends on its name, never on who drew before it or on how many ranks run."""

import hashlib

import torch
from torch import Generator


def stream_seed(seed: int, purpose: str, *ids: int) -> int:
    """63-bit seed of the stream (seed, purpose, ids...), equal on every machine and Python."""
    name = "/".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *ids: int, device: torch.device | str = "cpu") -> Generator:
    """A fresh generator on `device` for the stream (seed, purpose, ids...)."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose, *ids))
