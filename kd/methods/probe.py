"""Linear evaluation: what a linear classifier makes of frozen features, as for students that saw no labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError


def linear_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-4, steps: int = 500) -> nn.Linear:
    """The classifier of features [N, D] and labels [N] with the least mean CE + decay |W|^2 / 2, in float64.

    Convex, so that neither start nor order matters. ConfigError: not converged after `steps` of L-BFGS.
    """
    layer = nn.Linear(features.shape[1], classes, device=features.device, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    rows = features.double()
    solver = torch.optim.LBFGS(
        layer.parameters(), max_iter=steps, tolerance_grad=1e-7, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(layer(rows), labels) + decay / 2 * layer.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    slope = max(float(p.grad.abs().max()) for p in layer.parameters() if p.grad is not None)
    if slope > 1e-4:
        raise ConfigError(f"linear probe: slope {slope:.1e} after {steps} steps; standardise features, or raise decay")
    return layer.requires_grad_(False)
