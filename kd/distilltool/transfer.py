"""A student that starts as some of its teacher's layers."""

from collections.abc import Sequence

import torch
from torch import nn

from config import ConfigError
from kd.distilltool.loop import unwrapped


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of layers, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


@torch.no_grad()
def init_student_from_layers(model_T: nn.Module, model_S: nn.Module, layers: Sequence[int]) -> list[str]:
    """Layer i of the student becomes the teacher's layer layers[i]; all else is copied where name and shape agree.

    Layers are entries of an nn.ModuleList, the first being 0. Returns the names of the student's tensors that stay as
    they were. Raises ConfigError where lists or layers do not fit.
    """
    teacher, student = unwrapped(model_T), unwrapped(model_S)
    of_T, of_S = stacks(teacher), stacks(student)
    pairs = [(name, name) for name, stack in of_S.items() if len(stack) == len(layers) and name in of_T]
    if not pairs:
        pairs = [(t, s) for t in of_T for s, stack in of_S.items() if len(stack) == len(layers)][:1]
    if not pairs:
        depths = ", ".join(f"{name} of {len(stack)}" for name, stack in of_S.items()) or "no nn.ModuleList"
        raise ConfigError(f"layers: {list(layers)} are {len(layers)}, but the student has {depths}")
    source, target = teacher.state_dict(), student.state_dict()
    origin = {name: name for name in target if not any(name.startswith(f"{s}.") for _, s in pairs)}
    for name_T, name_S in pairs:
        depth = len(of_T[name_T])
        for i, layer in enumerate(layers):
            if not -depth <= layer < depth:
                raise ConfigError(f"layers: {layer}, but {name_T} of the teacher has layers 0 to {depth - 1}")
            here, there = f"{name_S}.{i}.", f"{name_T}.{layer % depth}."
            for name in [name for name in target if name.startswith(here)]:
                origin[name] = there + name.removeprefix(here)
                if origin[name] not in source or source[origin[name]].shape != target[name].shape:
                    found = list(source[origin[name]].shape) if origin[name] in source else "absent"
                    raise ConfigError(
                        f"{name}: {list(target[name].shape)}, but the teacher's {origin[name]} is {found}"
                    )
    left = []
    for name, tensor in target.items():  # shares memory with the student
        other = source.get(origin[name])
        if other is None or other.shape != tensor.shape:
            left.append(name)
        else:
            tensor.copy_(other)
    return left
