"""Tables and report of `distill_text.py`: what every student is worth, how large and how fast it is."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from kd.text_config import ARMS, Arm
from kd.text_lab import Fit, Found, TextLab
from utils.report import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    draw_scores,
    gain,
    loss_curve,
    spread,
    write_report,
)
from utils.utils_text import TextSet

# Of a student and its teacher: the number in a result, its column, digits.
FIDELITY = (("agreement", "agreement, %", 2), ("kl_to_teacher", "KL, nats", 3), ("cka", "CKA, %", 2))
TIMED, ROUNDS = 512, 7  # documents of a speed, times that it is taken


@torch.no_grad()
def speeds(models: Sequence[nn.Module], documents: TextSet, batch: int, device: torch.device) -> list[list[float]]:
    """Documents per second of every model in every round; in a round they take turns on the same batches."""
    some = torch.arange(min(TIMED, len(documents)))
    inputs = [documents.input(part, device) for part in some.split(batch)]
    found: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS + 1):
        for model, kept in zip(models, found, strict=True):
            began = time.perf_counter()
            for x in inputs:
                model(x.tokens, attention_mask=x.mask)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            kept.append(len(some) / (time.perf_counter() - began))
    return [kept[1:] for kept in found]  # the first round warms up


def score_table(lab: TextLab, of_teacher: Found, rows: Mapping[Arm, Sequence[Found]]) -> Table:
    """Test scores of the teacher and of every arm at its learning rate, and its fidelity to the teacher.

    A dash: of a student that an earlier version scored, no fidelity is known.
    """
    s, several = lab.cfg.student, lab.corpus.multilabel
    names = {"micro": "micro-F1", "macro": "macro-F1", "map": "mAP"} if several else {"micro": "accuracy"}
    seen = min(s.documents or len(lab.parts[0]), len(lab.parts[0]))
    cells = [("teacher", f"{len(lab.parts[0]):,}", *(spread([of_teacher[f"test_{n}"]]) for n in names), "", "",
              spread([of_teacher["seconds"]], 0), *[""] * len(FIDELITY))]  # fmt: skip
    for arm, found in rows.items():
        values = {name: [x[f"test_{name}"] for x in found] for name in names}
        base = [x["test_micro"] for x in rows["alone"]] if arm != "alone" and "alone" in rows else None
        cells.append((
            ARMS[arm], f"{seen:,}", *(spread(own) for own in values.values()),
            gain(values["micro"], base) if base else "", f"{found[0]['lr']:g}",
            spread([x["seconds"] for x in found], 0),
            *(spread([x[n] for x in found], d) if all(n in x for x in found) else "-" for n, _, d in FIDELITY),
        ))  # fmt: skip
    scores, pair = (f"{name}, %" for name in names.values()), (title for _, title, _ in FIDELITY)
    twofold = ", of every (document, label) as a sample of two classes, decided at 0.5" if several else ""
    return Table(
        ("model", "documents", *scores, "over alone", "lr", "seconds", *pair),
        tuple(cells),
        f"{lab.corpus.name}, {len(lab.parts[2]):,} test documents: mean and deviation over seeds {list(s.seeds)}; over "
        f"alone: mean and standard error of the paired differences; agreement with and KL to the teacher{twofold}; CKA "
        "with it, of pooled rows",
    )


def size_table(lab: TextLab, models: Mapping[str, nn.Module], rates: Mapping[str, Sequence[float]]) -> Table:
    """Layers, parameters and speed of `teacher` and `student`; `rates`: documents per second in every round."""
    cfg, s = lab.cfg, lab.cfg.student
    rows = []
    for name, settings in (("teacher", cfg.teacher), ("student", s)):
        size = parameters(models[name])
        rows.append((name, str(settings.layers), f"{size:,}", f"{size * 4e-6:.1f}", spread(rates[name], 0)))
    return Table(
        ("model", "layers", "parameters", "MB", "documents per second"),
        tuple(rows),
        f"Size in float32; speed on {lab.world.device.type}, {torch.get_num_threads()} thread(s), batches of "
        f"{s.batch_size} of at most {cfg.max_length} tokens, in turns, mean and deviation of {ROUNDS} rounds; "
        f"the student is {mean(rates['student']) / mean(rates['teacher']):.2f} times as fast",
    )


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def search_table(found: Mapping[tuple[Arm, float], Sequence[Found]]) -> Table:
    """Validation scores by arm and learning rate, over seeds."""
    arms, rates = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    rows = tuple((ARMS[arm], *(spread([x["val_micro"] for x in found[arm, lr]]) for lr in rates)) for arm in arms)
    return Table(("arm", *(f"lr {lr:g}" for lr in rates)), rows, "On validation, by learning rate")


def write_tables(
    lab: TextLab, folder: Path, tables: Sequence[Table], kept: Fit, scores: Mapping[str, Sequence[float]]
) -> None:
    """The report, with test `scores` of every model and the curves of the student that is kept."""
    lines = [json.loads(line) for line in (kept.folder / "metrics.jsonl").read_text().splitlines()]
    curves = folder / "images" / "curves.png"
    names = [name for name in lines[0] if name != "step"]
    loss_curve(curves, {name: [(x["step"], x[name]) for x in lines] for name in names}, "step", "value")
    picture, several = folder / "images" / "scores.png", lab.corpus.multilabel
    draw_scores(picture, scores, f"test {'micro-F1' if several else 'accuracy'}, %")
    s, t = lab.cfg.student, lab.cfg.teacher
    blocks: list[Block] = [
        Paragraph(
            f"{t.layers} layers teach {s.layers}, copied from {list(s.copied_layers)}; {s.epochs} epochs of "
            f"{s.batch_size} a batch for every student. Learning rates, of a student the kept seed"
            f"{', thresholds' if several else ''}: chosen on validation."
        ),
        Picture(picture, "a dot a seed, a bar at the mean"), *tables,
        Heading(f"Training of {kept.folder.name}"), Picture(curves, "by step"),
    ]  # fmt: skip
    write_report(folder, f"{lab.corpus.name}: {t.layers} layers to {s.layers}", blocks)
