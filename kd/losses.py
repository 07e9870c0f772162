"""Distillation losses on the logits of images and their regions: KD, DKD, NKD, each standardised, weighed, or both.

KD: Hinton et al. 2015. DKD: Zhao et al., CVPR 2022. NKD: Yang et al., ICCV 2023. LSKD, standardised logits: Sun et al.,
CVPR 2024. SDD, regions and their weights: Luo et al., CVPR 2024. Every method is `distillation_loss` with its settings.
Pure functions of tensors that never wait for the device.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from config import ConfigError, Section
from utils.losses import kl_rows, squared, widened

Base = Literal["kd", "dkd", "nkd"]
Deviation = Literal["sample", "population"]
WeightRule = Literal["none", "correctness", "class"]
Reduction = Literal["mean", "sum", "group_mean"]
Compat = Literal["sdd_nkd", "sdd_kd_lskd", "sdd_dkd_lskd"]


class LossConfig(Section):
    """A distillation loss: of a row (a region of a sample), then over regions and batch.

    `weight_rule`, which regions count 1 as being like the whole image. correctness: the teacher is right in both or
    wrong in both (SDD's code); class: it says the same (SDD's paper). All others count `complement_weight`.
    `reduction` over regions, then the mean over the batch. sum: SDD's equation 10. group_mean: the mean of all rows
    like the whole image plus the mean of all others.
    `compat` gives value and gradient of a public program wherever its loss is finite; public losses that are not named
    here are settings. sdd_nkd (NKD, SDD_NKD): the target class stays among the non-target ones. sdd_kd_lskd:
    group_mean, row r = region * B + sample being compared to the whole image of sample r // N. sdd_dkd_lskd: the sum
    over regions and batch, but the mean over the batch where N = 1.
    """

    base: Base = "kd"
    temperature: float = Field(2.0, gt=0)
    standardise: bool = True  # LSKD
    deviation: Deviation = "sample"  # by K - 1, as LSKD's code; population: by K, as its Algorithm 1
    alpha: float = Field(1.0, ge=0)  # of dkd: target class against the rest
    beta: float = Field(8.0, ge=0)  # of dkd: within the rest
    gamma: float = Field(1.5, ge=0)  # of nkd: within the rest
    weight_rule: WeightRule = "correctness"
    complement_weight: float = Field(2.0, ge=0)
    reduction: Reduction = "mean"
    compat: Compat | None = None

    @model_validator(mode="after")
    def check(self) -> "LossConfig":
        """A public variant stands on its own base loss."""
        base = {"sdd_nkd": "nkd", "sdd_kd_lskd": "kd", "sdd_dkd_lskd": "dkd"}.get(self.compat or "", self.base)
        if self.base != base:
            raise ValueError(f"compat: {self.compat} varies {base}, but base is {self.base}; set one like the other")
        if self.compat in ("sdd_kd_lskd", "sdd_dkd_lskd") and not self.standardise:
            raise ValueError(f"compat: {self.compat} standardises logits, but standardise is false; set it true")
        return self


def normalize_logit(logits: Tensor, deviation: Deviation = "sample", eps: float = 1e-7) -> Tensor:
    """z-score of every row [..., K]: (z - mean) / (deviation + eps), eps outside the root as in the code of LSKD."""
    count = logits.shape[-1] - (deviation == "sample")
    centred = widened(logits)
    centred = centred - centred.mean(-1, keepdim=True)
    spread = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(count)
    return centred * (spread + eps).reciprocal()  # on a CPU faster than torch.std and a division a logit


def dkd_rows(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float | Tensor
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of every row: logits [..., K], target [...] -> [...]. ConfigError: K < 3.

    TCKD: KL of {target, rest}; its logit is d = z_y / T - logsumexp of the rest. NCKD: KL within the rest.
    """
    refuse_two_classes("dkd", student)
    (d_s, rest_s, _), (d_t, rest_t, p_t) = (_split(widened(z) / temperature, target) for z in (student, teacher))
    yes, no = F.logsigmoid(d_t), F.logsigmoid(-d_t)
    tckd = yes.exp() * (yes - F.logsigmoid(d_s)) + no.exp() * (no - F.logsigmoid(-d_s))
    return squared(temperature) * (alpha * tckd + beta * (p_t * (rest_t - rest_s)).sum(-1))


def nkd_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    gamma: float,
    temperature: float | Tensor,
    whole: bool = False,
    learned: bool = False,
) -> Tensor:
    """-p_t(y) log p_s(y), both at T = 1, - gamma T^2 sum of q_t log q_s, both within the rest at T: [..., K], [...] ->
    [...]. `whole` (compat sdd_nkd): the rest is all classes. ConfigError: K < 3.

    A `learned` T sees q_t log (q_s / q_t) instead: T^2 times the teacher's entropy always grows with T.
    """
    refuse_two_classes("nkd", student)
    student, teacher, y = widened(student), widened(teacher), target[..., None]
    hit = (teacher.log_softmax(-1).gather(-1, y).exp() * student.log_softmax(-1).gather(-1, y)).squeeze(-1)
    if whole:
        log_s, log_t = ((z / temperature).log_softmax(-1) for z in (student, teacher))
        p_t = log_t.exp()
    else:
        (_, log_s, _), (_, log_t, p_t) = (_split(z / temperature, target) for z in (student, teacher))
    gap = log_s - log_t if learned else log_s
    return -hit - gamma * squared(temperature) * (p_t * gap).sum(-1)


def _split(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log odds of the target [...], log-probabilities within the rest and probabilities (0 at the target) [..., K]."""
    y = target[..., None]
    rest = z.scatter(-1, y, -math.inf)
    norm = rest.logsumexp(-1, keepdim=True)
    return (z.gather(-1, y) - norm).squeeze(-1), z - norm, (rest - norm).exp()


def refuse_two_classes(base: str, logits: Tensor) -> None:
    """Raise ConfigError where logits [..., K] leave fewer than 2 non-target classes."""
    if logits.shape[-1] < 3:
        raise ConfigError(
            f"{base}: {logits.shape[-1]} classes, but it compares the classes beside the target, of which there must "
            "be 2: take kd, or 3 classes"
        )


def distillation_loss(
    student: Tensor, teacher: Tensor, target: Tensor, settings: LossConfig, temperature: Tensor | None = None
) -> Tensor:
    """Loss [] of region logits [B, K, N], region 0 being the whole image, with target [B]; for every method.

    `temperature` [B] or [1], of samples, stands in for the settings' number. Raises ConfigError for dkd and nkd with
    K < 3.
    """
    s, student, teacher = settings, widened(student.mT.contiguous()), widened(teacher.mT.contiguous())  # [B, N, K]
    said, y = teacher.argmax(-1), target[:, None].expand(-1, teacher.shape[1])
    if s.standardise:
        student, teacher = normalize_logit(student, s.deviation), normalize_logit(teacher, s.deviation)
    degrees = s.temperature if temperature is None else temperature[:, None, None]
    if s.base == "kd":
        rows = kl_rows(student, teacher, degrees)
    elif s.base == "dkd":
        rows = dkd_rows(student, teacher, y, s.alpha, s.beta, degrees)
    else:
        rows = nkd_rows(student, teacher, y, s.gamma, degrees, s.compat == "sdd_nkd", temperature is not None)
    if s.weight_rule == "none":
        same = torch.ones_like(rows, dtype=torch.bool)
    else:
        found = said == y if s.weight_rule == "correctness" else said
        whole_image = found[:, :1].expand_as(found)
        if s.compat == "sdd_kd_lskd":
            whole_image = whole_image.reshape(found.mT.shape).mT
        same = found == whole_image  # [B, N]
    if s.reduction == "group_mean" or s.compat == "sdd_kd_lskd":
        like, unlike = (torch.where(group, rows, 0).sum() / group.sum().clamp_min(1) for group in (same, ~same))
        return like + unlike
    rows = torch.where(same, rows, s.complement_weight * rows)
    if s.compat == "sdd_dkd_lskd" and rows.shape[1] > 1:
        return rows.sum()
    return rows.sum(1).mean() if s.reduction == "sum" else rows.mean()


def kd_loss_with_lskd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL of standardised logits [B, C], mean over the batch: []."""
    return kl_rows(normalize_logit(student), normalize_logit(teacher), temperature).mean()


def multi_scale_distillation_with_lskd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    *,
    deviation: Deviation = "sample",
    weight_rule: WeightRule = "correctness",
    complement_weight: float = 2.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """SDD with KD and LSKD: [] for region logits [B, C, N], region 0 being the whole image, with target [B]."""
    settings = LossConfig(
        temperature=temperature, deviation=deviation, weight_rule=weight_rule, complement_weight=complement_weight,
        reduction=reduction,
    )  # fmt: skip
    return distillation_loss(student, teacher, target, settings)


def suggested_temperature(classes: int) -> float:
    """T for standardised logits at which the surest teacher gives its class probability 0.6, as at K = 100 with T = 2.

    One logit above K - 1 equal ones has z-scores sqrt(K) apart: p = 1 / (1 + (K - 1) exp(-sqrt(K) / T)).
    """
    return math.sqrt(classes) / (5 + math.log((classes - 1) / 99))
