"""The sampling net of NCFM: where in frequency space to look, learned against the synthetic set."""

import math

import torch
from torch import Tensor, nn

SMALLEST, LARGEST = 0.25, 8.0  # on the unit sphere, scales beyond see a constant or noise
FREQUENCIES_PER_SCALE = 16


class SamplingNet(nn.Module):
    """A scale mixture of normals p(t) = mean_m N(0, s_m^2 I) with one learned scale per 16 frequencies and layer.

    The set descends on the loss while the scales ascend on it, in the same backward pass: `ascend` turns the sign.
    """

    def __init__(self, layers: int, num_freqs: int, start: tuple[float, ...]) -> None:
        super().__init__()
        count = math.ceil(num_freqs / FREQUENCIES_PER_SCALE)
        self.num_freqs = num_freqs
        first = torch.tensor(start)[torch.arange(count) % len(start)].clamp(SMALLEST * 1.01, LARGEST * 0.99)
        share = (first / SMALLEST).log() / math.log(LARGEST / SMALLEST)
        self.raw = nn.Parameter(share.logit().repeat(layers, 1))  # [L, M]

    def scales(self) -> Tensor:
        """Scales [L, M], between SMALLEST and LARGEST, equal steps of `raw` being equal ratios."""
        return SMALLEST * (LARGEST / SMALLEST) ** self.raw.sigmoid()

    def forward(self, noise: Tensor) -> Tensor:
        """Frequencies [L, F, D] from normal noise [L, F, D]."""
        which = torch.arange(self.num_freqs, device=noise.device) % self.raw.shape[1]
        return noise * self.scales()[:, which, None]

    def ascend(self, t: Tensor, grad_t: Tensor) -> None:
        """Put the gradient of minus the loss into the parameters, given the loss's gradient [L, F, D] at t."""
        t.backward(-grad_t)
