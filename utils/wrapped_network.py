"""Any classifier with a last map and a linear head as an ImageNetwork, by its own code: torchvision's or a user's.

A trial run finds which call reads the last map; from then on the module runs up to that call and no further.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config import ConfigError
from config.schema import nearest
from utils.image_networks import ImageNetwork

TRIAL_SEED = 0  # of dropout in trial runs
AVERAGES = ("adaptive_avg_pool2d", "avg_pool2d", "mean")


def foreign_module(name: str, nclass: int) -> nn.Module:
    """The module of torchvision:NAME without weights, or of package.module:factory. Raises ConfigError."""
    place, _, factory = name.partition(":")
    if place == "torchvision":
        from torchvision import models

        known = models.list_models(module=models)
        if factory not in known:
            raise ConfigError(f"network: torchvision has no classifier '{factory}'{nearest(factory, known)}")
        found: Any = models.get_model(factory, weights=None, num_classes=nclass)
        return found
    try:
        make = getattr(importlib.import_module(place), factory)
        found = make(num_classes=nclass)
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"network: {name}(num_classes={nclass}) failed ({error}): put its folder on PYTHONPATH, and write it as "
            "package.module:factory with an argument num_classes"
        ) from error
    if not isinstance(found, nn.Module):
        raise ConfigError(f"network: {name} gives {type(found).__name__}: return a torch.nn.Module")
    return found


class Found(NamedTuple):
    """Where a module reads its last map, and what follows."""

    call: str  # name of the function that reads the map
    number: int  # which call of that name, from 1
    pool: str  # a layer called once that begins with it, if there is one
    averages: bool  # it gives the mean over pixels; else the pixels one after another
    layers: tuple[tuple[str, bool], ...]  # that follow, before the head, and whether they read rows [B, D]
    head: str


class WrappedNetwork(ImageNetwork):
    """A module with a last map and a linear head; its parameters keep their names after PLACE."""

    PLACE = "blocks.0.module."

    def __init__(self, name: str, module: nn.Module, channels: int, size: int, nclass: int) -> None:
        """Raises ConfigError where `module` has no such parts."""
        nn.Module.__init__(self)
        before = {key: value.clone() for key, value in module.named_buffers()}
        x = torch.randn(2, channels, size, size)
        found, logits = locate(name, module.eval(), x)
        if logits.shape != (len(x), nclass):
            raise ConfigError(f"network: {name} gives {list(logits.shape)[1:]} numbers an image, not {nclass} classes")
        self.found, self.blocks = found, nn.ModuleList([Trunk(module, found)])
        # Parts of `module`, which is registered once: every parameter has one name.
        self.__dict__.update(join=Join(module, found), head=module.get_submodule(found.head))
        if not self._gives(logits, x):
            raise ConfigError(
                f"network: {name} does more between its last map and its head '{found.head}' than layer after layer: "
                "make that a chain of layers"
            )
        trained, logits = locate(name, module.train(), x)
        if trained != found or not self._gives(logits, x):
            raise ConfigError(
                f"network: {name} has another way from its last map to its head in training than in evaluation: "
                "make it one chain of layers without auxiliary heads and with dropout as nn.Dropout"
            )
        for key, value in before.items():  # running statistics moved in training mode
            module.get_buffer(key).copy_(value)

    @torch.no_grad()
    def _gives(self, logits: Tensor, x: Tensor) -> bool:
        try:
            with torch.random.fork_rng():
                torch.manual_seed(TRIAL_SEED)
                return torch.allclose(self(x).logits, logits, rtol=1e-3, atol=1e-4)
        except (RuntimeError, ValueError):  # layers of a branch that do not fit together
            return False

    @property
    def classifier(self) -> nn.Module:
        """What turns means [R, C] of the last map into logits [R, K]. ConfigError: it reads pixels apart."""
        if not self.found.averages:
            raise ConfigError("M: the network does not average its last map, so that regions have no logits; set [1]")
        return nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), self.join, self.head) if self.found.layers else self.head


class Trunk(nn.Module):
    """A module up to its last map."""

    def __init__(self, module: nn.Module, found: Found) -> None:
        super().__init__()
        self.module, self.found = module, found

    def forward(self, x: Tensor) -> Tensor:
        """The last map [B, C, H, W] of images [B, channels, size, size]."""
        call, number, pool = self.found[:3]
        stop = self.module.get_submodule(pool).register_forward_pre_hook(reached) if pool else Until(call, number)
        try:
            with stop:
                self.module(x)
        except Reached as end:
            return end.maps
        raise ConfigError(f"network: it makes no call {number} of {call} on these images, as in its trial run")


class Join(nn.Module):
    """What stands between the last map and the head; the layers are those of the module."""

    module: nn.Module

    def __init__(self, module: nn.Module, found: Found) -> None:
        super().__init__()
        self.averages, self.layers = found.averages, found.layers
        self.__dict__["module"] = module  # which the trunk has registered

    def forward(self, maps: Tensor) -> Tensor:
        """Rows [B, D] of maps [B, C, H, W]."""
        x = maps.mean((2, 3), keepdim=True) if self.averages else maps
        for path, rows in self.layers:
            x = self.module.get_submodule(path)(x.flatten(1) if rows else x)
        return x.flatten(1)


class Reached(Exception):
    """The last map is there."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps


def reached(layer: nn.Module, read: Any) -> None:
    """Raises Reached with the first tensor that a layer is about to read."""
    raise Reached(next(tensors(read)))


class Until(TorchFunctionMode):
    """Ends a run by Reached before the `number`-th call of a function by its name."""

    def __init__(self, call: str, number: int) -> None:
        super().__init__()
        self.call, self.left = call, number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call itself. Raises Reached."""
        self.left -= getattr(func, "__name__", "") == self.call
        if not self.left:
            raise Reached(next(tensors((args, kwargs))))
        return func(*args, **(kwargs or {}))


class Call(NamedTuple):
    """A call of a function."""

    name: str
    read: Tensor | None  # the first tensor
    given: list[Tensor]
    again: Callable[[], Any]


class Start(NamedTuple):
    """The start of a layer without parts."""

    path: str
    calls: int  # before it
    read: Tensor


class Calls(TorchFunctionMode):
    """Keeps every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call itself."""
        again = partial(func, *args, **(kwargs or {}))
        out, read = again(), next(tensors((args, kwargs)), None)
        self.calls.append(Call(getattr(func, "__name__", ""), read, list(tensors(out)), again))
        return out

    def reader(self, end: int, rows: Tensor) -> tuple[int, Tensor] | None:
        """The call before `end` that turns a map [B, C, H, W] into `rows`, and the map; None: no call does."""
        x: Tensor | None = rows
        while x is not None and x.numel() == len(x) * max(x.shape[1:]):  # one row a sample
            end = next((i for i in reversed(range(end)) if any(t is x for t in self.calls[i].given)), -1)
            x = self.calls[end].read if end >= 0 else None
            if x is not None and x.dim() == 4 and self.calls[end].name in AVERAGES:
                break
        return None if x is None or x.dim() != 4 else (end, x)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def locate(name: str, module: nn.Module, x: Tensor) -> tuple[Found, Tensor]:
    """The parts of `module` by a run on images [B, channels, size, size] in its present mode, and its logits [B, K].

    Raises ConfigError where it has no map or no linear head.
    """
    watch, starts = Calls(), list[Start]()
    linears: list[tuple[str, int, Tensor, Tensor]] = []  # path, number of its call, what it reads and gives

    def before(path: str) -> Any:
        return lambda layer, read: starts.append(Start(path, len(watch.calls), next(tensors(read), x)))

    def after(path: str) -> Any:
        return lambda layer, read, given: linears.append((path, len(watch.calls) - 1, next(tensors(read), x), given))

    parts = dict(module.named_modules())
    hooks = [m.register_forward_pre_hook(before(path)) for path, m in parts.items() if not [*m.children()]]
    hooks += [m.register_forward_hook(after(path)) for path, m in parts.items() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad(), torch.random.fork_rng(), watch:
            torch.manual_seed(TRIAL_SEED)
            out = module(x)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0][:160]
        raise ConfigError(f"network: {name} fails on images {list(x.shape[1:])} ({reason}): resize them") from error
    finally:
        for hook in hooks:
            hook.remove()
    logits = out[0] if isinstance(out, tuple) else out
    if not linears or linears[-1][3] is not logits:
        raise ConfigError(f"network: {name} does not end in an nn.Linear, which regions share: take one that does")
    head, end, rows, _ = linears[-1]
    source = watch.reader(end, rows)
    if source is None:
        raise ConfigError(f"network: head '{head}' of {name} reads no map [B, C, H, W]: take a convolutional network")
    at, maps = source
    given = watch.calls[at].again()  # what it gave may have been overwritten since, by dropout in place
    averages = given.numel() == maps.shape[0] * maps.shape[1] and torch.allclose(
        given.flatten(1), maps.mean((2, 3)), rtol=1e-3, atol=1e-5
    )
    call = watch.calls[at].name
    if not averages and not torch.equal(given.flatten(1), maps.flatten(1)):
        raise ConfigError(f"network: {name} reads its last map by {call}: average it, as nn.AdaptiveAvgPool2d(1) does")
    number = sum(other.name == call for other in watch.calls[: at + 1])
    once = [s.path for s in starts if sum(s.path == other.path for other in starts) == 1]
    pool = next((s.path for s in starts if s.calls == at and s.read is maps and s.path in once), "")
    layers = tuple((s.path, s.read.dim() == 2) for s in starts if at < s.calls <= end and s.path != head)
    if all(isinstance(parts[path], nn.Flatten | nn.Identity) for path, _ in layers):
        layers = ()
    return Found(call, number, pool, averages, layers, head), logits
