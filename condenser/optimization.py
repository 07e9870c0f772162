"""How NCFM's rows move: optimiser, and rates in units of the data."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from config import Section

ADAM = ("adam", "adamw")


class OptimizationConfig(Section):
    """How the synthetic data moves."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr_img: float = Field(gt=0)
    mom_img: float = Field(0.5, ge=0, lt=1)  # momentum of sgd
    lr_scale_adam: float = Field(0.1, gt=0)  # factor on lr_img for adam and adamw
    weight_decay: float = Field(0.0, ge=0)
    lr_relative: bool = True  # rates are in units of the data's own scale (text: deviation of the word table)
    scheduler: Literal["cosine", "constant"] = "cosine"
    lr_sampling_net: float = Field(1e-3, gt=0)

    def rate(self, scale: float) -> float:
        """The optimiser's learning rate for data of this scale."""
        if self.optimizer in ADAM:  # a step is about lr, whatever the gradient
            return self.lr_img * self.lr_scale_adam * (scale if self.lr_relative else 1.0)
        return self.lr_img * (
            scale**2 if self.lr_relative else 1.0
        )  # x = scale u: du = lr dL/du is dx = lr scale^2 dL/dx


def make_optimizer(data: Tensor, settings: OptimizationConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser of the synthetic data."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD([data], lr=lr, momentum=settings.mom_img, weight_decay=settings.weight_decay)
    # Second moments of a loss whose frequencies and teacher change at every step: a shorter memory than 0.999.
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind([data], lr=lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
