"""Outputs of inner modules, caught while a model is called."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from config import ConfigError
from config.schema import nearest
from kd.distilltool.matches import MATCH_LOSS_MAP, MatchLoss, resolve
from kd.distilltool.settings import checked_proj

KEYS = ("module_T", "module_S", "loss", "weight", "proj", "select")


@dataclass(frozen=True)
class CustomMatch:
    """weight * loss(proj(output of module_S), output of module_T, mask=inputs_mask)."""

    name: str
    modules_T: tuple[nn.Module, ...]  # one, or two for a loss of pairs
    modules_S: tuple[nn.Module, ...]
    loss: MatchLoss
    own: bool  # the loss is the user's
    weight: float
    proj: nn.Module | tuple[Any, ...] | None
    select: Any  # output -> tensor


def custom_match(given: Any, model_T: nn.Module, model_S: nn.Module) -> CustomMatch:
    """A match from a dict with KEYS (proj and select may be absent). Raises ConfigError."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"custom_matches: {type(given).__name__}, not a dict with keys of {', '.join(KEYS)}")
    for key in given:
        if key not in KEYS:
            raise ConfigError(
                f"custom_matches: {key!r}: unknown key; known: {', '.join(KEYS)}{nearest(str(key), KEYS)}"
            )
    for key in KEYS[:4]:
        if key not in given:
            raise ConfigError(f"custom_matches: {key}: required, and not given")
    loss, weight, proj = given["loss"], given["weight"], given.get("proj")
    if not isinstance(weight, int | float):
        raise ConfigError(f"custom_matches: weight: {weight!r} is not a number")
    own = callable(loss)
    name = getattr(loss, "__name__", type(loss).__name__) if own else resolve("match loss", str(loss), MATCH_LOSS_MAP)
    if proj is not None and not isinstance(proj, nn.Module):
        proj = checked_proj(tuple(proj) if isinstance(proj, list | tuple) else (proj,))
    modules_T, names_T = inner(given["module_T"], model_T, "module_T")
    modules_S, names_S = inner(given["module_S"], model_S, "module_S")
    return CustomMatch(
        f"{name} {names_T}>{names_S}", modules_T, modules_S, loss if own else MATCH_LOSS_MAP[name], own,
        float(weight), proj, given.get("select"),
    )  # fmt: skip


def inner(given: Any, model: nn.Module, key: str) -> tuple[tuple[nn.Module, ...], str]:
    """The modules that a name, a module or a list of two means, and how to call them. Raises ConfigError."""
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise ConfigError(f"custom_matches: {key}: not with DataParallel on several devices, which copies modules")
    known, found, names = dict(model.named_modules()), [], []
    for item in given if isinstance(given, list | tuple) else (given,):
        name = next((n for n, m in known.items() if m is item), None) if isinstance(item, nn.Module) else str(item)
        name = f"module.{name}" if name not in known and f"module.{name}" in known else name
        if name is None or name not in known:
            what = "a module that is not in the model" if name is None else f"no module {name!r}"
            raise ConfigError(f"custom_matches: {key}: {what}{nearest(str(name), known)}")
        found.append(known[name])
        names.append(name.removeprefix("module."))
    return tuple(found), ",".join(names)


@contextmanager
def taps(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """What each module gives in calls of its model inside the block; of several calls the last."""
    caught: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        caught[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def tensor_of(match: CustomMatch, output: Any, key: str) -> Tensor:
    """The feature in a module's output: what `select` takes, else its first tensor. Raises ConfigError."""
    if match.select:
        output = match.select(output)
    elif isinstance(output, Mapping):
        output = next(iter(output.values()))
    elif isinstance(output, list | tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"custom_matches: {match.name}: {key} gives {type(output).__name__}, not a tensor; use select"
        )
    return output
