"""Every method as a term of the loss: what it compares, what it learns beside the student, what it remembers.

A term reads one pass of a student and one of a teacher. Parameters are learned with the student's, buffers and extra
state are kept in the checkpoint. L = CE weight x CE + the sum over terms of weight x warm-up x term.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import ConfigError
from kd.losses import LossConfig, distillation_loss
from kd.methods import contrast, hints, relations, rotations, transformer
from kd.methods.chains import Dlb, LastBatch, last_batch_loss
from utils.streams import generator

Spread = Callable[[Tensor], Tensor]  # rows of this rank's samples -> rows of all ranks', in the order of the batch


class Pass(NamedTuple):
    """A forward: logits of regions [B, K, N], the image first, the head's rows [B, D], maps [B, C, H, W] of blocks."""

    regions: Tensor
    rows: Tensor
    maps: tuple[Tensor, ...] = ()

    @property
    def logits(self) -> Tensor:
        """Of the whole image [B, K]."""
        return self.regions[:, :, 0]


class Seen(NamedTuple):
    """What a term looks at in a step. `labels` and `ids` [B] are of samples, of which passes may have several views."""

    student: Pass
    teacher: Pass
    labels: Tensor
    ids: Tensor
    fresh: int  # how many samples are new, the others coming again
    step: int
    rank: tuple[int, ...] = ()  # of draws: nothing on the first rank
    temperature: Tensor | None = None  # [B] or [1], learned; None: the term's own
    again: float = 1.0  # what a mean over those that come again counts for beside one over all


class Shapes(NamedTuple):
    """Of one image's pass: numbers that the head reads, [C, H, W] of every block's map."""

    rows: int
    maps: tuple[tuple[int, ...], ...]


def levels(maps: Sequence[Sequence[int]]) -> list[int]:
    """Which of maps [C, H, W] are the last of their size: a ResNet's three stages without its stem."""
    return [i for i, shape in enumerate(maps) if i + 1 == len(maps) or maps[i + 1][1:] != shape[1:]]


def pairs(student: Shapes, teacher: Shapes) -> list[tuple[int, int]]:
    """Numbers of the maps that are compared, shallow first: levels of both, the deepest to the deepest."""
    found = zip(reversed(levels(student.maps)), reversed(levels(teacher.maps)), strict=False)
    return list(found)[::-1]


class Term(nn.Module, ABC):
    """A part of the loss beside cross-entropy."""

    reads_rows = reads_maps = False
    taught = True  # by a teacher: there is one of the term for every teacher

    def __init__(self, weight: float, warmup: float = 0) -> None:
        super().__init__()
        self.weight, self.warmup = weight, warmup  # the latter in epochs

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Its value []."""

    def remember(self, spread: Spread) -> None:
        """After the optimiser's step: keep what later steps need. All ranks together."""


class LogitTerm(Term):
    """KD, DKD, NKD, of regions or standardised or both."""

    def __init__(self, settings: LossConfig, weight: float, warmup: float) -> None:
        super().__init__(weight, warmup)
        self.settings = settings

    def forward(self, seen: Seen) -> Tensor:
        """`distillation_loss`."""
        return distillation_loss(
            seen.student.regions, seen.teacher.regions, seen.labels, self.settings, seen.temperature
        )


class DistTerm(Term):
    """DIST."""

    def __init__(self, s: relations.Dist) -> None:
        super().__init__(s.WEIGHT)
        self.s = s

    def forward(self, seen: Seen) -> Tensor:
        """`dist_loss`."""
        s = self.s
        return relations.dist_loss(seen.student.logits, seen.teacher.logits, s.TEMPERATURE, s.INTER, s.INTRA)


class RowsTerm(Term):
    """A loss of what the heads read [B, D]: RKD, PKT."""

    reads_rows = True

    def __init__(self, weight: float, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(weight)
        self.loss = loss

    def forward(self, seen: Seen) -> Tensor:
        """The loss."""
        return self.loss(seen.student.rows, seen.teacher.rows)


class MapsTerm(Term):
    """A loss of maps, summed over `pairs`: AT, NST, SP, and with a learned part a pair FitNet, VID, ICKD, TaT."""

    reads_maps = True

    def __init__(
        self,
        weight: float,
        numbers: Sequence[tuple[int, int]],
        loss: Callable[[Any, Tensor], Tensor],
        parts: Sequence[nn.Module] = (),
    ) -> None:
        """`loss` takes a student map, or what its part makes of it, and a teacher map."""
        super().__init__(weight)
        self.numbers, self.loss, self.parts = numbers, loss, nn.ModuleList(parts)

    def forward(self, seen: Seen) -> Tensor:
        """The sum."""
        total = seen.student.regions.new_zeros(())
        for turn, (s, t) in enumerate(self.numbers):
            own, said = seen.student.maps[s], seen.teacher.maps[t]
            total = total + self.loss(self.parts[turn](own) if self.parts else own, said)
        return total


class ReviewTerm(Term):
    """ReviewKD."""

    reads_rows = reads_maps = True

    def __init__(self, s: hints.Review, warmup: float, student: Shapes, teacher: Shapes) -> None:
        super().__init__(s.WEIGHT, warmup)
        self.numbers = pairs(student, teacher)
        own = [*(student.maps[i][0] for i, _ in self.numbers), student.rows]
        said = [*(teacher.maps[i][0] for _, i in self.numbers), teacher.rows]
        self.review = hints.KnowledgeReview(own, said, s.WIDTH)

    def forward(self, seen: Seen) -> Tensor:
        """`review_loss` over all levels and the pooled rows."""
        own = [*(seen.student.maps[i] for i, _ in self.numbers), seen.student.rows[..., None, None]]
        said = [*(seen.teacher.maps[i] for _, i in self.numbers), seen.teacher.rows[..., None, None]]
        return hints.review_loss(self.review(own, [x.shape[2:] for x in said]), said)


class TatTerm(Term):
    """TaT on the last maps."""

    reads_maps = True

    def __init__(self, s: transformer.Tat, student: Shapes, teacher: Shapes) -> None:
        """Raises ConfigError for an anchor that is larger than the maps."""
        super().__init__(s.WEIGHT)
        self.s, own, said = s, student.maps[-1][0], teacher.maps[-1][0]
        side = min(*student.maps[-1][1:], *teacher.maps[-1][1:])
        if s.CELLS > 1 and side < s.ANCHOR:
            raise ConfigError(f"TAT.ANCHOR: {s.ANCHOR}, but the last maps have {side} pixels a side; take at most that")
        self.aware: nn.Module = (
            transformer.TargetAware(own, said, s.KERNEL) if s.CELLS == 1
            else transformer.HierarchicalTargetAware(own, said, s.KERNEL, s.CELLS, s.GROUPS, s.ANCHOR)
        )  # fmt: skip

    def forward(self, seen: Seen) -> Tensor:
        """Mean squared difference of the teacher's map and its copy; of patches and of the anchor."""
        found = self.aware(seen.student.maps[-1], said := seen.teacher.maps[-1])
        if isinstance(found, tuple):
            return self.s.PATCH * found[0] + self.s.GLOBAL * found[1]
        return nn.functional.mse_loss(found, said)


class CrdTerm(Term):
    """CRD; embeddings of both networks are learned, all samples' are remembered."""

    reads_rows = True

    def __init__(self, s: contrast.Crd, student: Shapes, teacher: Shapes, labels: Tensor, seed: int) -> None:
        """`labels` [N] of all training samples."""
        super().__init__(s.WEIGHT)
        self.s, self.stream = s, (seed, "crd negatives")
        self.own, self.said = (contrast.UnitEmbedding(shapes.rows, s.WIDTH) for shapes in (student, teacher))
        memory = contrast.crd_memory(len(labels), s.WIDTH, generator(seed, "crd memory"))
        for name, value in zip(memory._fields, memory, strict=True):
            self.register_buffer(name, value)
        gaps = contrast.class_gaps(labels)
        for name, value in zip(gaps._fields, gaps, strict=True):
            self.register_buffer(name, value, persistent=False)
        self.news: tuple[Tensor, ...] = ()

    @property
    def memory(self) -> contrast.CrdMemory:
        """What is remembered."""
        return contrast.CrdMemory(*(self.get_buffer(name) for name in contrast.CrdMemory._fields))

    def forward(self, seen: Seen) -> Tensor:
        """`crd_loss` against negatives drawn for this step."""
        own, said = self.own(seen.student.rows), self.said(seen.teacher.rows)
        gaps = contrast.ClassGaps(*(self.get_buffer(name) for name in contrast.ClassGaps._fields))
        drawn = contrast.crd_negatives(
            gaps, seen.labels, self.s.NEGATIVES, generator(*self.stream, seen.step, *seen.rank)
        )  # fmt: skip
        loss, scale = contrast.crd_loss(own, said, self.memory, seen.ids, drawn, self.s.TEMPERATURE)
        fresh = slice(seen.fresh)
        self.news = (own.detach()[fresh], said.detach()[fresh], seen.ids[fresh], scale.expand(seen.fresh, 2))
        return loss

    def remember(self, spread: Spread) -> None:
        """`crd_remember` of every rank's samples."""
        own, said, ids, scale = (spread(x) for x in self.news)
        contrast.crd_remember(self.memory, own, said, ids, scale.mean(0), self.s.MOMENTUM)


class HsakdTerm(Term):
    """HSAKD of a student, whose passes are of `rotated` images."""

    reads_maps = True

    def __init__(
        self, s: rotations.Hsakd, student: Shapes, teacher: Shapes, classes: int, of_teacher: dict[str, Tensor]
    ) -> None:
        """`of_teacher`: the state of the teacher's heads."""
        super().__init__(1.0)
        self.s, self.numbers = s, pairs(student, teacher)
        self.heads = rotations.HierarchicalHeads([student.maps[i][0] for i, _ in self.numbers], classes)
        self.frozen = rotations.HierarchicalHeads([teacher.maps[i][0] for i in levels(teacher.maps)], classes)
        self.frozen.load_state_dict(of_teacher)
        self.frozen.requires_grad_(False)
        self.first = len(levels(teacher.maps)) - len(self.numbers)  # of the teacher's heads

    def train(self, mode: bool = True) -> "HsakdTerm":
        """The teacher's heads never train."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, seen: Seen) -> Tensor:
        """`student_loss`."""
        with torch.no_grad():
            maps = [seen.teacher.maps[i] for i in levels([x.shape[1:] for x in seen.teacher.maps])]
            said = self.frozen(maps)[self.first :]
        own = self.heads([seen.student.maps[i] for i, _ in self.numbers])
        main, heads = rotations.student_loss(seen.student.logits, own, seen.teacher.logits, said, self.s.TEMPERATURE)
        return self.s.MAIN * main + self.s.HEADS * heads


class HsakdTeacherTerm(Term):
    """HSAKD's first phase: a network without a teacher learns its heads."""

    reads_maps, taught = True, False

    def __init__(self, student: Shapes, classes: int) -> None:
        super().__init__(1.0)
        self.numbers = levels(student.maps)
        self.heads = rotations.HierarchicalHeads([student.maps[i][0] for i in self.numbers], classes)

    def forward(self, seen: Seen) -> Tensor:
        """Cross-entropy of joint labels, summed over heads."""
        return rotations.joint_loss(self.heads([seen.student.maps[i] for i in self.numbers]), seen.labels)


class BingoTerm(Term):
    """BINGO; the student's pass is of anchors, then of a member of each one's bag."""

    reads_rows = True

    def __init__(self, s: contrast.Bingo, student: Shapes, teacher: Shapes, seed: int) -> None:
        super().__init__(1.0)
        self.s, self.embed = s, contrast.UnitEmbedding(student.rows, teacher.rows)
        queue = contrast.key_queue(s.QUEUE, teacher.rows, generator(seed, "bingo queue"))
        self.register_buffer("keys", queue.keys)
        self.register_buffer("place", queue.place)
        self.news = torch.empty(0)

    @property
    def queue(self) -> contrast.KeyQueue:
        """Keys of batches before this one."""
        return contrast.KeyQueue(self.get_buffer("keys"), self.get_buffer("place"))

    def forward(self, seen: Seen) -> Tensor:
        """`bingo_loss`."""
        anchor, member = self.embed(seen.student.rows).chunk(2)
        self.news = relations.unit(seen.teacher.rows)
        intra, inter = contrast.bingo_loss(anchor, member, self.news, self.queue.keys, self.s.TEMPERATURE)
        return self.s.INTRA * intra + self.s.INTER * inter

    def remember(self, spread: Spread) -> None:
        """Push the keys of every rank's samples."""
        contrast.push(self.queue, spread(self.news))


class DlbTerm(Term):
    """DLB: the student's pass is of new samples, then of those of the batch before in another view."""

    taught = False

    def __init__(self, s: Dlb) -> None:
        super().__init__(s.WEIGHT)
        self.s = s
        self.last: LastBatch | None = None
        self.news: tuple[Tensor, ...] = ()

    def forward(self, seen: Seen) -> Tensor:
        """`last_batch_loss`; 0 where nothing comes again."""
        logits = seen.student.logits
        self.news = (seen.ids[: seen.fresh], logits[: seen.fresh].detach())
        again, ids = logits[seen.fresh :], seen.ids[seen.fresh :]
        if self.last is None or not len(ids):
            return logits.new_zeros(())
        last = LastBatch(*(x.to(ids.device) for x in self.last))  # a checkpoint's are on the CPU
        match = last.ids == ids[:, None]
        known, before = match.any(1), last.logits[match.int().argmax(1)]
        return seen.again * last_batch_loss(again, before, self.s.TEMPERATURE, known)

    def remember(self, spread: Spread) -> None:
        """Keep the new samples' logits."""
        self.last = LastBatch(*(spread(x) for x in self.news))

    def get_extra_state(self) -> list[Tensor]:
        """The last batch."""
        return list(self.last or ())

    def set_extra_state(self, state: list[Tensor]) -> None:
        """Take over the last batch."""
        self.last = LastBatch(*state) if state else None
