"""The two losses of a synthetic image batch, one value a class; all classes of the batch in one forward pass."""

from torch import Tensor, nn

from NCFM.cf_loss import Distance, class_distances
from utils.losses import task_loss


def compute_match_loss(
    model_interval: nn.Module, images: Tensor, real: Tensor, t: Tensor, loss_func: Distance, match_weight: float
) -> Tensor:
    """Matching loss [K] of K classes with n images each, class by class in `images` [K * n, channels, H, W].

    `real` [1, K, M]: mean embeddings of the real classes' last features under the same network, at t [1, F, D].
    """
    features = model_interval(images).features[0].unflatten(0, (real.shape[1], -1))  # [K, n, D]
    return match_weight * class_distances(real[0], features, t[0], loss_func)


def compute_calib_loss(
    model_final: nn.Module, images: Tensor, targets: Tensor, classes: int, calib_weight: float
) -> Tensor:
    """Calibration loss [K]: the trained teacher's cross-entropy on the images, mean over a class's samples."""
    loss = task_loss(model_final(images).logits, targets, multilabel=False)
    return calib_weight * loss.unflatten(0, (classes, -1)).mean(1)
