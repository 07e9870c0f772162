"""The two losses of a synthetic text batch, one value a class; all classes of the batch in one forward pass."""

from torch import Tensor, nn

from NCFM.cf_loss import Distance
from NCFM.NCFM_text import mutil_layer_match_loss
from utils.encoder import TextInput
from utils.losses import task_loss


def compute_match_loss(
    model_interval: nn.Module,
    rows: TextInput,
    real: Tensor,
    t: Tensor,
    loss_func: Distance,
    match_weight: float,
) -> Tensor:
    """Matching loss [K] of K classes with n samples each, class by class in `rows` [K * n, ...].

    `real` [L, K, M]: mean embeddings of the real classes under the same network and frequencies t [L, F, D].
    """
    features = model_interval(rows).features  # [L, K * n, D]
    layers, count, dim = features.shape
    classes = real.shape[1]
    return mutil_layer_match_loss(
        real, features.view(layers, classes, count // classes, dim), t, loss_func, match_weight
    )


def compute_calib_loss(
    model_final: nn.Module,
    rows: TextInput,
    targets: Tensor,
    classes: int,
    multilabel: bool,
    calib_weight: float,
) -> Tensor:
    """Calibration loss [K]: the trained teacher's task loss on the rows [K * n, ...], mean over a class's samples."""
    loss = task_loss(model_final(rows).logits, targets, multilabel)
    return calib_weight * loss.view(classes, -1).mean(1)
