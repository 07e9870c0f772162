"""The one way in which every network is called: `logits, features = net(x)`."""

from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """What every network returns: logits [B, C] and the matched features [L, B, D]."""

    logits: Tensor
    features: Tensor
