"""Between models and losses: batches to calls, and what adaptors return to checked tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from config import ConfigError
from config.schema import nearest
from kd.distilltool.matches import ADAPTOR_KEYS, FEATURES

Adaptor = Callable[[Any, Any], Mapping[str, Any]]  # (batch, model's outputs) -> ADAPTOR_KEYS, all of them optional
Place = tuple[str, int]  # a feature and which of its list


@dataclass(frozen=True)
class Results:
    """What an adaptor returned, as far as a distiller asks for it."""

    logits: tuple[Tensor, ...] = ()  # each [B, C] or [B, L, C]
    logits_mask: tuple[Tensor, ...] = ()  # none, one for all or one each, [B, L]
    losses: tuple[Tensor, ...] = ()
    inputs_mask: Tensor | None = None  # [B, L]
    features: Mapping[Place, Tensor] = field(default_factory=dict)


def move(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device; mappings become dicts, lists and tuples stay what they are."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [move(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def call(model: nn.Module, batch: Any, args: Mapping[str, Any]) -> Any:
    """The model's outputs: model(**batch, **args) for a mapping, model(*batch, **args) for a list or tuple."""
    if isinstance(batch, Mapping):
        return model(**batch, **args)
    return model(*batch, **args) if isinstance(batch, list | tuple) else model(batch, **args)


def for_whom(batch: Any, who: str) -> Any:
    """The part of a batch {"teacher": ..., "student": ...} that is for one of them; any other batch is for both."""
    both = isinstance(batch, Mapping) and batch.keys() == {"teacher", "student"}
    return batch[who] if both else batch


def read(given: Any, who: str, wanted: Iterable[Place]) -> Results:
    """The results of adaptor `who`, with the wanted features. Raises ConfigError naming the key that is wrong."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{who}: returned {type(given).__name__}; return a dict with keys of {', '.join(ADAPTOR_KEYS)}"
        )
    known = [*dict.fromkeys([*ADAPTOR_KEYS, *FEATURES])]
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{who}: {key!r} is not an adaptor key; known: {', '.join(known)}{nearest(str(key), known)}"
            )
    logits, masks, losses = (tensors(given.get(key), who, key) for key in ("logits", "logits_mask", "losses"))
    if len(masks) not in (0, 1, len(logits)):
        raise ConfigError(f"{who}: 'logits_mask' has {len(masks)} masks, 'logits' {len(logits)}: give one, or one each")
    inputs_mask = given.get("inputs_mask")
    if inputs_mask is not None and not isinstance(inputs_mask, Tensor):
        raise ConfigError(f"{who}: 'inputs_mask' is {type(inputs_mask).__name__}, not one tensor [B, L]")
    features = {(name, number): chosen(given, who, name, number) for name, number in wanted}
    return Results(logits, masks, losses, inputs_mask, features)


def tensors(value: Any, who: str, key: str) -> tuple[Tensor, ...]:
    """One tensor or several, as several. Raises ConfigError."""
    several = () if value is None else (value,) if isinstance(value, Tensor) else value
    if not isinstance(several, list | tuple) or not all(isinstance(item, Tensor) for item in several):
        raise ConfigError(f"{who}: {key!r} is {type(value).__name__}, not a tensor or a list of tensors")
    return tuple(several)


def chosen(given: Mapping[str, Any], who: str, name: str, number: int) -> Tensor:
    """One of a feature's list. Raises ConfigError where it is not there."""
    several = given.get(name)
    if several is None:
        raise ConfigError(f"{who}: no key {name!r}, which intermediate_matches compare: return it as a list of tensors")
    if isinstance(several, Tensor) or not isinstance(several, Sequence):
        raise ConfigError(f"{who}: {name!r} is {type(several).__name__}, not a list of tensors")
    if not several:
        advice = ": load the model with attn_implementation='eager'" if name == "attention" else ""
        raise ConfigError(f"{who}: {name!r} is empty, but intermediate_matches compare it{advice}")
    if not -len(several) <= number < len(several):
        raise ConfigError(f"{who}: {name!r} has {len(several)} entries, there is no layer {number}")
    if not isinstance(several[number], Tensor):
        raise ConfigError(f"{who}: {name!r}: entry {number} is {type(several[number]).__name__}, not a tensor")
    return several[number]
