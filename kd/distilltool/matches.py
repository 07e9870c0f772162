"""What is compared with what: the losses on logits and on features, and the containers that name them.

B: samples, L: positions, H: heads, D: features, C: classes. A mask [B, L] keeps the positions that are not 0; what
stands at the others, even nan, changes neither value nor gradient. No position left: 0. Attention is given as scores:
of probabilities give the logarithm, for softmax(log p) = p.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ConfigError
from config.schema import nearest
from utils.losses import FLOOR, cross_entropy_rows, masked_mean, selected, similarity, widened

MatchLoss = Callable[..., Tensor]  # (state_S, state_T, mask=None) -> []
KdLoss = Callable[[Tensor, Tensor, float], Tensor]
EPS = 1e-8  # least norm of a feature


def require(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, dims: Iterable[int], hint: str) -> None:
    """Raise ConfigError unless both states have one shape, of so many dimensions, and the mask its [B, L]."""
    shapes = f"{name}: student {list(student.shape)}, teacher {list(teacher.shape)}"
    if student.shape != teacher.shape or student.dim() not in dims:
        raise ConfigError(f"{shapes}: one shape of {' or '.join(map(str, dims))} dimensions is needed; {hint}")
    if mask is not None and list(mask.shape) != [student.shape[0], student.shape[-2]]:
        raise ConfigError(f"{shapes}, mask {list(mask.shape)}: the mask must be [B, L]")


def square(mask: Tensor | None) -> Tensor | None:
    """[B, L] -> [B, L, L]: both query and key are kept."""
    return None if mask is None else (mask[:, :, None] != 0) & (mask[:, None, :] != 0)


def attention_mse(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean (s - t)^2 of attention [B, H, L, L] over kept queries and keys: [] (TinyBERT, Jiao et al. 2020)."""
    require("attention_mse", state_S, state_T, mask, (4,), "attention_mse_sum takes [B, L, L] and differing heads")
    both = square(mask)
    return squares(state_S, state_T, None if both is None else both[:, None])


def attention_mse_sum(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """attention_mse of [B, L, L], or of [B, H, L, L] summed over its heads."""
    state_S, state_T = (x.sum(1) if x.dim() == 4 else x for x in (widened(state_S), widened(state_T)))
    require("attention_mse_sum", state_S, state_T, mask, (3,), "give [B, L, L] or [B, H, L, L]")
    return squares(state_S, state_T, square(mask))


def attention_ce(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over kept queries of -sum p_T log p_S, softmax over the kept keys of scores [B, H, L, L]: []."""
    require("attention_ce", state_S, state_T, mask, (4,), "attention_ce_mean takes [B, L, L] and differing heads")
    return query_cross_entropy(state_S, state_T, mask)


def attention_ce_mean(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """attention_ce of scores [B, L, L], or of [B, H, L, L] averaged over heads before the softmax."""
    state_S, state_T = (x.mean(1) if x.dim() == 4 else x for x in (widened(state_S), widened(state_T)))
    require("attention_ce_mean", state_S, state_T, mask, (3,), "give [B, L, L] or [B, H, L, L]")
    return query_cross_entropy(state_S[:, None], state_T[:, None], mask)


def query_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """attention_ce without its check of shapes."""
    if mask is None:
        return cross_entropy_rows(student, teacher, 1.0).mean()
    keys, queries = mask[:, None, None], mask[:, None, :, None]  # of a left-out query every score is FLOOR
    student, teacher = (selected(selected(widened(x), keys, FLOOR), queries, FLOOR) for x in (student, teacher))
    return masked_mean(cross_entropy_rows(student, teacher, 1.0), mask[:, None])


def hidden_mse(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean (s - t)^2 of hidden states [B, L, D] over kept positions and D, or of [B, D] without a mask: []."""
    require("hidden_mse", state_S, state_T, mask, (2, 3), "for another D add proj ['linear', D_S, D_T]")
    return squares(state_S, state_T, None if mask is None else mask[..., None])


def cos(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean 1 - cos(s, t) of [B, L, D] over kept positions, or of [B, D]: [] (DistilBERT, Sanh et al. 2019)."""
    require("cos", state_S, state_T, mask, (2, 3), "for another D add proj ['linear', D_S, D_T]")
    rows = None if mask is None else mask[..., None]
    return masked_mean(1 - (unit(selected(state_S, rows)) * unit(selected(state_T, rows))).sum(-1), mask)


def pkd(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over samples of |s/|s| - t/|t||^2 at position 0 of [B, L, D], or of [B, D]; no mask (Sun et al. 2019)."""
    require("pkd", state_S, state_T, None, (2, 3), "for another D add proj ['linear', D_S, D_T]")
    first = [x[:, 0] if x.dim() == 3 else x for x in (state_S, state_T)]
    return masked_mean((unit(first[0]) - unit(first[1])).square().sum(-1))


def gram(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean (s - t)^2 of the channel similarities of two pairs of hidden states [B, L, D], over samples and D^2: [].

    Flow of solution matrices (Yim et al. 2017). A sample without a kept position does not count.
    """
    require_pairs("gram", state_S, state_T, mask)
    require("gram", state_S[0], state_T[0], mask, (3,), "for another D add proj ['linear', D_S, D_T]")
    kept = None if mask is None else (mask != 0).any(1)[:, None, None]
    student, teacher = (similarity(x[0], x[1], "channels", mask) for x in (state_S, state_T))
    return squares(student, teacher, kept)


def mmd(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean (s - t)^2 of the token similarities of two pairs of hidden states [B, L, D_S] and [B, L, D_T]: [].

    Similarities are per feature, 1 / D (neuron selectivity transfer, Huang & Wang 2017).
    """
    require_pairs("mmd", state_S, state_T, mask)
    require("mmd", state_S[0][..., :1], state_T[0][..., :1], mask, (3,), "B and L must be those of the teacher")
    student, teacher = (similarity(x[0], x[1], "tokens", mask) for x in (state_S, state_T))
    return squares(student, teacher, square(mask))


def require_pairs(name: str, state_S: Any, state_T: Any, mask: Tensor | None) -> None:
    """Raise ConfigError unless each state is two matrices of one shape."""
    for who, state in (("student", state_S), ("teacher", state_T)):
        if torch.is_tensor(state) or len(state) != 2:
            raise ConfigError(f"{name}: {who}: a list of two matrices [B, L, D] is needed")
        require(f"{name} of the {who}'s pair", state[0], state[1], mask, (3,), "name two layers of one width")


def squares(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean (s - t)^2 over the kept entries."""
    return masked_mean((selected(widened(student), mask) - selected(widened(teacher), mask)).square(), mask)


def unit(x: Tensor) -> Tensor:
    """Rows [..., D] of length 1; a zero row stays zero."""
    x = widened(x)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)


def kd_ce(logits_S: Tensor, logits_T: Tensor, temperature: float) -> Tensor:
    """Mean over rows of -sum softmax(t/T) log softmax(s/T), logits [..., C]: []; no factor T^2."""
    return masked_mean(cross_entropy_rows(logits_S, logits_T, temperature))


def kd_mse(logits_S: Tensor, logits_T: Tensor, temperature: float) -> Tensor:
    """Mean ((s - t) / T)^2 of logits [..., C]: []."""
    return masked_mean(((widened(logits_S) - widened(logits_T)) / temperature).square())


def kd_bce(logits_S: Tensor, logits_T: Tensor, temperature: float) -> Tensor:
    """Mean over rows of binary cross-entropies with sigmoid(t/T), summed over labels, of logits [..., C]: []."""
    student, teacher = widened(logits_S) / temperature, widened(logits_T) / temperature
    return masked_mean(F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").sum(-1))


FEATURES = ["hidden", "attention"]
ADAPTOR_KEYS = ["logits", "logits_mask", "losses", "inputs_mask", *FEATURES]
KD_LOSS_MAP: dict[str, KdLoss] = {"ce": kd_ce, "mse": kd_mse, "bce": kd_bce}
MATCH_LOSS_MAP: dict[str, MatchLoss] = {
    "attention_mse_sum": attention_mse_sum,
    "attention_mse": attention_mse,
    "attention_ce_mean": attention_ce_mean,
    "attention_ce": attention_ce,
    "hidden_mse": hidden_mse,
    "cos": cos,
    "pkd": pkd,
    "gram": gram,
    "mmd": mmd,
}
PAIRED = ("gram", "mmd")
ALIASES = {"fsp": "gram", "nst": "mmd", "linear_projection": "linear"}  # names in use elsewhere


def resolve(kind: str, name: str, known: Iterable[str]) -> str:
    """The name in a container that a name means. Raises ConfigError with the nearest."""
    known = list(known)
    if name not in known and ALIASES.get(name) not in known:
        raise ConfigError(f"{name!r} is not a {kind}; known: {', '.join(known)}{nearest(name, known)}")
    return name if name in known else ALIASES[name]
