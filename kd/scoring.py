"""What a student is worth on held-out images: accuracy, likelihood, calibration, agreement with its teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.ddp import World
from utils.report import Table

ECE_BINS = 15


@dataclass(frozen=True)
class Score:
    """Shares in percent; nll in nats."""

    top1: float
    top5: float
    nll: float
    ece: float

    def as_dict(self) -> dict[str, float]:
        """Name -> value."""
        return asdict(self)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts [2] of rows [N, K] whose label [N] is the largest, and one of the five largest, logits."""
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.sum()])


def calibration_error(probs: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error of probs [N, K] in percent: mean gap of confidence and accuracy in bins (Guo 2017)."""
    sure, said = probs.double().max(1)
    which = (sure * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, sure - (said == labels).double())
    return 100 * float(gap.abs().sum() / len(labels))


def score(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Score:
    """Scores of logits [N, K] divided by a temperature."""
    z = logits.double() / temperature
    first, five = hits(z, labels).tolist()
    return Score(
        100 * first / len(z), 100 * five / len(z), float(F.cross_entropy(z, labels)),
        calibration_error(z.softmax(1), labels),
    )  # fmt: skip


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in 0.01 ... 100 with the least NLL of logits [N, K] / T; NLL is convex in 1 / T, so bisection finds it."""
    z = logits.double()
    said = z.gather(1, labels[:, None]).mean()
    low, high = 0.01, 100.0  # of 1 / T
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((z * middle).softmax(1) * z).sum(1).mean() - said  # d NLL / d (1 / T)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / (low * high) ** 0.5


def final_scores(logits: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """Scores of test logits [N, K], and those at a temperature fitted to held-out (logits, labels) with their top-1."""
    found = score(logits, labels).as_dict()
    if held:
        temperature = fit_temperature(*held)
        scaled = score(logits, labels, temperature)
        found |= {"temperature": temperature, "nll_scaled": scaled.nll, "ece_scaled": scaled.ece}
        found |= {"held_out_top1": score(*held).top1}
    return found


COLUMNS = {  # of result tables: the number in a run's result, its name
    "top1": "top-1, last", "top5": "top-5", "nll": "NLL", "ece": "ECE", "nll_scaled": "NLL, scaled",
    "ece_scaled": "ECE, scaled", "agreement": "agreement", "kl_to_teacher": "KL to teacher",
    "js_to_teacher": "JS to teacher", "cka": "CKA", "teacher_top1": "teacher", "best_top1": "top-1, best",
    "held_out_top1": "top-1, held out", "epoch_seconds": "s/epoch",
}  # fmt: skip


def result_table(results: Sequence[tuple[str, Mapping[str, float]]], caption: str = "") -> Table:
    """Final numbers of runs; best is chosen on the test images. A run without a number has a dash."""
    names = [name for name in COLUMNS if any(name in found for _, found in results)]
    digits = [3 if "nll" in name or "_to_" in name else 2 for name in names]  # of nats more than of percents
    rows = [
        (label, *(f"{found[n]:.{d}f}" if n in found else "-" for n, d in zip(names, digits, strict=True)))
        for label, found in results
    ]
    return Table(("run", *(COLUMNS[name] for name in names)), tuple(rows), caption)


def shares(count: int, batch: int, ranks: int) -> list[list[Tensor]]:
    """Every rank's batches of the samples 0 ... count - 1, each sample once."""
    parts = torch.arange(count).split(batch)
    return [list(parts[rank::ranks]) for rank in range(ranks)]


@torch.no_grad()
def all_logits(read: Callable[[Tensor], Tensor], count: int, batch: int, world: World) -> Tensor | None:
    """Logits [N, K] on the CPU of rank 0, else None, of N samples that the ranks share; `read` gives those of some."""
    parts = shares(count, batch, world.size)
    rows = [read(which).float().cpu() for which in parts[world.rank]]
    width = int(world.broadcast(rows[0].shape[1] if world.main else 0))
    own = torch.cat(rows) if rows else torch.zeros(0, width)
    return world.gather_rows(own, [torch.cat([*part, torch.arange(0)]).tolist() for part in parts])
