"""Distances of two feature distributions: the characteristic function of NCFM (CVPR 2025) and plain means.

Both compare mean embeddings: phi(x) = (cos t.x, sin t.x) at every frequency t, or phi(x) = x. So the real side of a
class is one vector, which can be kept, and all classes go through one matrix product. Pure functions of tensors.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class CFLossFunc:
    """Amplitude- and phase-weighted distance of two empirical characteristic functions.

    At each frequency, with Phi the real and phi the synthetic value, A = |Phi|, a = |phi|, d = Phi - phi:
        alpha (A - a)^2 + beta (|d|^2 - (A - a)^2),    the second term being 2 A a (1 - cos(phase difference));
    the loss is the mean over frequencies of its root. Written as beta |d|^2 + (alpha - beta)(A - a)^2 with
    A - a = (A^2 - a^2) / (A + a) it subtracts no nearly equal products, and stays exact in float32 near zero.
    """

    alpha_for_loss: float = 0.5
    beta_for_loss: float = 0.5

    def __call__(self, feat_real: Tensor, feat_syn: Tensor, t: Tensor) -> Tensor:
        """Scalar distance of features [B1, D] and [B2, D] at frequencies t [F, D]."""
        return self.distance(self.embed(feat_real, t).mean(-2), self.embed(feat_syn, t).mean(-2))

    def embed(self, x: Tensor, t: Tensor) -> Tensor:
        """cos and sin of t.x side by side: features [..., B, D], frequencies [..., F, D] -> [..., B, 2F]."""
        angle = x @ t.mT
        if angle.dtype == torch.bfloat16:  # too coarse for what follows
            angle = angle.float()
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def distance(self, real: Tensor, syn: Tensor) -> Tensor:
        """Distance of mean embeddings [..., 2F]: [...]."""
        (re_real, im_real), (re_syn, im_syn) = real.chunk(2, -1), syn.chunk(2, -1)
        d_re, d_im = re_real - re_syn, im_real - im_syn
        squared = d_re.square() + d_im.square()
        if self.alpha_for_loss == self.beta_for_loss:  # then the moduli cancel out
            value = self.beta_for_loss * squared
        else:
            moduli = root(re_real.square() + im_real.square()) + root(re_syn.square() + im_syn.square())
            amplitude = (d_re * (re_real + re_syn) + d_im * (im_real + im_syn)) / moduli  # A - a
            value = self.beta_for_loss * squared + (self.alpha_for_loss - self.beta_for_loss) * amplitude.square()
        return root(value).mean(-1)


@dataclass(frozen=True)
class MeanLossFunc:
    """Squared distance of the mean features (maximum mean discrepancy with a linear kernel): the control."""

    def __call__(self, feat_real: Tensor, feat_syn: Tensor, t: Tensor) -> Tensor:
        """Scalar distance of features [B1, D] and [B2, D]; t is not used."""
        return self.distance(feat_real.mean(-2), feat_syn.mean(-2))

    def embed(self, x: Tensor, t: Tensor) -> Tensor:
        """The features themselves [..., B, D]."""
        return x

    def distance(self, real: Tensor, syn: Tensor) -> Tensor:
        """Squared distance of mean features [..., D]: [...]."""
        return (real - syn).square().sum(-1)


Distance = CFLossFunc | MeanLossFunc


def real_embedding(feat_real: Tensor, t: Tensor, loss_func: Distance) -> Tensor:
    """Mean embedding [L, M] of one class's unit features, from features [L, B, D] and frequencies t [L, F, D]."""
    return loss_func.embed(F.normalize(feat_real, dim=-1), t).mean(-2)


def class_distances(real: Tensor, feat_syn: Tensor, t: Tensor, loss_func: Distance) -> Tensor:
    """Distance of every class [K] at one layer: mean embeddings [K, M] of real unit features against the synthetic
    features [K, n, D], at frequencies t [F, D]."""
    return loss_func.distance(real, loss_func.embed(F.normalize(feat_syn, dim=-1), t).mean(-2))


def root(x: Tensor) -> Tensor:
    """Square root whose gradient is 0, not infinite, below the rounding error of its argument."""
    return x.clamp_min(torch.finfo(x.dtype).eps ** 2).sqrt()


def frequencies(shape: tuple[int, ...], scales: tuple[float, ...], gen: Generator, like: Tensor) -> Tensor:
    """Frequencies [..., F, D] ~ N(0, s^2 I), the F of them dealt round-robin to the scales s."""
    t = torch.randn(shape, generator=gen, device=gen.device).to(like)
    spread = torch.tensor(scales).to(like)[torch.arange(shape[-2]) % len(scales)]
    return t * spread[:, None]
