"""How a training set is judged, whatever it is made of: fresh students trained on it alone, tested on real data."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from utils.fit import FitConfig, fit, make_optimizer, predict, supervised
from utils.metrics import best_threshold, probabilities, score
from utils.sampling import training_batch
from utils.streams import generator

RowName = Literal[
    "full", "condensed", "mean_matching", "initial", "random", "herding", "k_center", "tfidf_full", "tfidf_random",
    "condensed_soft", "random_soft", "condensed_plain", "random_plain",
]  # fmt: skip


class EvaluationConfig(FitConfig):
    """Students: how many, how long, on which rows of the table."""

    steps: int = Field(ge=1)  # the same for every row
    repeat: int = Field(3, ge=1)  # students of a row and condensation seed
    seeds: tuple[int, ...] = ()  # condensation and subset seeds; empty = the config's seed
    which: Literal["best", "last"] = "best"  # by the held-out score, or after the last iteration
    # The state of a student that is tested: the last, the best on validation, or - as papers have it - on the test set.
    select: Literal["last", "best_validation", "best_test"] = "last"
    probe_every: int = Field(50, ge=1)  # steps between the states that `select` looks at
    rows: tuple[RowName, ...] = (
        "full", "condensed", "mean_matching", "initial", "random", "k_center", "condensed_soft", "random_soft",
    )  # fmt: skip

    @model_validator(mode="after")
    def check(self) -> "EvaluationConfig":
        """At least one row."""
        if not self.rows:
            raise ValueError(f"rows: at least one of {', '.join(get_args(RowName))}")
        return self


class TrainingSet(Protocol):
    """What a student is trained on, and what it is tested on."""

    @property
    def lengths(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def input(self, samples: Tensor, device: torch.device) -> Any: ...

    def batch(self, samples: Tensor, device: torch.device) -> tuple[Any, Tensor]: ...


@dataclass(frozen=True)
class Part:
    """Some samples [n] of a training set, as a set of its own."""

    whole: TrainingSet
    samples: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> Tensor:
        """Of these samples [n]."""
        return self.whole.lengths[self.samples]

    @property
    def targets(self) -> Tensor:
        """Of these samples [n, C]."""
        return self.whole.targets[self.samples]

    def input(self, samples: Tensor, device: torch.device) -> Any:
        """What a network reads of samples of the part."""
        return self.whole.input(self.samples[samples], device)

    def batch(self, samples: Tensor, device: torch.device) -> tuple[Any, Tensor]:
        """Samples of the part with their targets."""
        return self.whole.batch(self.samples[samples], device)


Augment = Callable[[Any, Tensor, torch.Generator], tuple[Any, Tensor]]  # of a batch and its targets


@dataclass(frozen=True)
class StudentScore:
    """One student: percent at threshold 0.5 and at the one chosen on validation; seconds of training."""

    micro_half: float
    macro_half: float
    micro: float
    macro: float
    map: float
    exact: float
    threshold: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        """Name -> number."""
        return asdict(self)


def train_student(
    net: nn.Module, train: TrainingSet, settings: FitConfig, steps: int, multilabel: bool, device: torch.device,
    stream: tuple[int, str, int], on_step: Callable[[int], None] | None = None, augment: Augment | None = None,
) -> nn.Module:  # fmt: skip
    """Train a fresh network on a set for a number of steps; `on_step` is told how many are done."""
    net.to(device)
    targets = train.targets
    if not multilabel:  # hard or soft labels as distributions
        targets = targets / targets.sum(1, keepdim=True).clamp_min(1e-8)

    def batch(step: int) -> tuple[Any, Tensor]:
        which = training_batch(train.lengths, settings.batch_size, step, stream[0], stream[2])
        x, y = train.input(which, device), targets[which].to(device)
        return augment(x, y, generator(stream[0], "augmentation", stream[2], step)) if augment else (x, y)

    loss = supervised(net, batch, multilabel)
    for step, _ in fit(net, loss, make_optimizer(net, settings), settings, range(steps), steps, stream):
        if on_step:
            on_step(step + 1)
    return net


def logits_of(net: nn.Module, data: TrainingSet, parts: list[list[int]], device: torch.device) -> Tensor:
    """Logits [N, C] of every sample, on the CPU."""
    return predict(net, lambda which: data.input(which, device), parts, len(data))


def judge(val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], multilabel: bool, seconds: float) -> StudentScore:
    """Scores from (probabilities [N, C], targets [N, C]) of validation and test; the threshold sees validation only."""
    threshold = best_threshold(*val) if multilabel else 0.5
    half, chosen = score(*test, multilabel, 0.5), score(*test, multilabel, threshold)
    return StudentScore(
        half.micro, half.macro, chosen.micro, chosen.macro, chosen.map, chosen.exact, threshold, seconds
    )


def evaluate_student(
    net: nn.Module, train: TrainingSet, val: TrainingSet, test: TrainingSet,
    parts: tuple[list[list[int]], list[list[int]]],
    settings: EvaluationConfig, multilabel: bool, device: torch.device, stream: tuple[int, str, int],
    on_step: Callable[[], None] | None = None, augment: Augment | None = None,
) -> StudentScore:  # fmt: skip
    """Train one student and judge it: its last state, unless `select` says otherwise; the test set is read once."""
    began = time.monotonic()
    best: tuple[float, dict[str, Tensor]] | None = None

    def scored(data: TrainingSet, part: list[list[int]]) -> tuple[Tensor, Tensor]:
        return probabilities(logits_of(net, data, part, device), multilabel), data.targets

    def look(done: int) -> None:
        nonlocal best
        if on_step:
            on_step()
        if settings.select != "last" and (done % settings.probe_every == 0 or done == settings.steps):
            chosen = (val, parts[0]) if settings.select == "best_validation" else (test, parts[1])
            value = held_out_micro(*scored(*chosen), multilabel)
            if best is None or value > best[0]:
                best = value, {name: value.clone() for name, value in net.state_dict().items()}
            net.train()

    train_student(net, train, settings, settings.steps, multilabel, device, stream, look, augment)
    seconds = time.monotonic() - began
    if best:
        net.load_state_dict(best[1])
    return judge(scored(val, parts[0]), scored(test, parts[1]), multilabel, seconds)


def held_out_micro(probs: Tensor, targets: Tensor, multilabel: bool) -> float:
    """Micro-F1 on held-out samples, averaged over threshold 0.5 and the best one, so that both columns count."""
    if not multilabel:
        return score(probs, targets, False, 0.5).micro
    return (
        score(probs, targets, True, 0.5).micro + score(probs, targets, True, best_threshold(probs, targets)).micro
    ) / 2


@dataclass(frozen=True)
class Row:
    """One row of a run's table: mean and deviation over students, bytes and documents of its set."""

    name: str
    network: str  # of the students; empty for the configured one
    ipc: int
    labels: Literal["hard", "soft"]
    students: int
    micro_mean: float  # at the validation-chosen threshold
    micro_std: float
    macro_mean: float
    macro_std: float
    micro_half_mean: float  # at threshold 0.5
    micro_half_std: float
    macro_half_mean: float
    macro_half_std: float
    map_mean: float
    map_std: float
    exact_mean: float
    threshold: float
    bytes: int
    documents: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Name -> value, for report.json."""
        return asdict(self)


def summarise(
    name: str,
    network: str,
    ipc: int,
    labels: Literal["hard", "soft"],
    scores: Sequence[StudentScore],
    nbytes: int,
    documents: int,
) -> Row:
    """Mean and deviation (n - 1) of the students of one row."""
    table = torch.tensor([list(s.as_dict().values()) for s in scores], dtype=torch.float64)
    mean = dict(zip(scores[0].as_dict(), table.mean(0).tolist(), strict=True))
    std = dict(
        zip(
            scores[0].as_dict(),
            (table.std(0) if len(scores) > 1 else table.mean(0) * 0).tolist(),
            strict=True,
        )
    )
    return Row(
        name, network, ipc, labels, len(scores), mean["micro"], std["micro"], mean["macro"], std["macro"],
        mean["micro_half"], std["micro_half"], mean["macro_half"], std["macro_half"], mean["map"], std["map"],
        mean["exact"], mean["threshold"], nbytes, documents, mean["seconds"],
    )  # fmt: skip


def soft_labels(data: Any, targets: Tensor) -> Any:
    """The same training set (a dataclass with `targets`) under other labels [N, C]."""
    return replace(data, targets=targets)


def linear_baseline(
    texts: Sequence[str], targets: Tensor, fit_texts: Sequence[str], val: tuple[Sequence[str], Tensor],
    test: tuple[Sequence[str], Tensor], multilabel: bool,
) -> StudentScore:  # fmt: skip
    """TF-IDF (weights from `fit_texts`) under one logistic regression a class, trained on texts with targets [N, C]."""
    import warnings

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    began = time.monotonic()
    words = TfidfVectorizer(sublinear_tf=True, max_features=20000).fit(fit_texts)
    model = OneVsRestClassifier(LogisticRegression(C=30.0, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is in every or no document of a subset is a constant
        model.fit(words.transform(texts), (targets > 0.5).int().numpy())
    probs = [torch.from_numpy(model.predict_proba(words.transform(part[0]))).float() for part in (val, test)]
    return judge((probs[0], val[1]), (probs[1], test[1]), multilabel, time.monotonic() - began)
