"""Matching losses of text features: one layer (the pooled output) or the pooled rows of several layers."""

import torch.nn.functional as F
from torch import Tensor

from NCFM.cf_loss import Distance


def match_loss(real: Tensor, feat_syn: Tensor, t: Tensor, loss_func: Distance, match_weight: float) -> Tensor:
    """Matching loss of every class [K] at one layer.

    `real` [K, M] are the classes' mean embeddings of unit features (see `real_embedding`), `feat_syn` [K, n, D] the
    features of their synthetic samples, `t` [F, D] the frequencies.
    """
    syn = loss_func.embed(F.normalize(feat_syn, dim=-1), t).mean(-2)
    return match_weight * loss_func.distance(real, syn)


def mutil_layer_match_loss(
    real: Tensor, feat_syn: Tensor, t: Tensor, loss_func: Distance, match_weight: float
) -> Tensor:
    """Mean over layers of `match_loss`: real [L, K, M], feat_syn [L, K, n, D], t [L, F, D] -> [K]."""
    layers = [match_loss(r, f, u, loss_func, match_weight) for r, f, u in zip(real, feat_syn, t, strict=True)]
    return sum(layers[1:], layers[0]) / len(layers)


multi_layer_match_loss = mutil_layer_match_loss  # the right spelling of the same function


def real_embedding(feat_real: Tensor, t: Tensor, loss_func: Distance) -> Tensor:
    """Mean embedding [L, M] of one class's real features [L, B, D] at frequencies t [L, F, D]."""
    return loss_func.embed(F.normalize(feat_real, dim=-1), t).mean(-2)
