"""Matching losses of text features: one layer (the pooled output) or the pooled rows of several layers."""

from torch import Tensor

from NCFM.cf_loss import Distance, class_distances


def match_loss(real: Tensor, feat_syn: Tensor, t: Tensor, loss_func: Distance, match_weight: float) -> Tensor:
    """Matching loss of every class [K] at one layer.

    `real` [K, M] are the classes' mean embeddings of unit features (see `cf_loss.real_embedding`), `feat_syn` [K, n, D]
    the features of their synthetic samples, `t` [F, D] the frequencies.
    """
    return match_weight * class_distances(real, feat_syn, t, loss_func)


def mutil_layer_match_loss(
    real: Tensor, feat_syn: Tensor, t: Tensor, loss_func: Distance, match_weight: float
) -> Tensor:
    """Mean over layers of `match_loss`: real [L, K, M], feat_syn [L, K, n, D], t [L, F, D] -> [K]."""
    layers = [match_loss(r, f, u, loss_func, match_weight) for r, f, u in zip(real, feat_syn, t, strict=True)]
    return sum(layers[1:], layers[0]) / len(layers)


multi_layer_match_loss = mutil_layer_match_loss  # the right spelling of the same function
