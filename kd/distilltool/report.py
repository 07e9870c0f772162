"""What stands at the start of a training: terms, shapes, first values, sizes, save points."""

from collections.abc import Mapping, Sequence

from torch import nn

from kd.distilltool.terms import Term
from utils.report import Table, plain_table


def term_table(terms: Sequence[Term]) -> str:
    """A line for each term."""
    rows = tuple((t.name, f"{t.weight:g}", t.student, t.teacher, f"{float(t.value):.4g}") for t in terms)
    return plain_table(Table(("term", "weight", "student", "teacher", "first value"), rows))


def start_report(
    terms: Sequence[Term], models: Mapping[str, nn.Module], steps: int, points: Sequence[int], notes: Sequence[str]
) -> str:
    """Lines of text; `models` by what they are called."""
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    saved = ", ".join(map(str, points[:6])) + (f", ... {points[-1]}" if len(points) > 6 else "")
    return "\n".join([
        "; ".join(f"{name}: {size:,} parameters" for name, size in sizes.items()),
        f"{steps} optimizer steps, saved after {saved}",
        term_table(terms),
        *notes,
    ])  # fmt: skip
