"""What a student's optimiser sees: the network, the terms of its loss, the temperature it plays against."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError
from kd.kd_batches import Batch
from kd.kd_config import UNTAUGHT, KdConfig
from kd.methods import hints, relations
from kd.methods.chains import kept_teachers
from kd.methods.temperature import GlobalTemperature, InstanceTemperature, curriculum
from kd.methods.terms import (
    BingoTerm,
    CrdTerm,
    DistTerm,
    DlbTerm,
    HsakdTeacherTerm,
    HsakdTerm,
    LogitTerm,
    MapsTerm,
    Pass,
    ReviewTerm,
    RowsTerm,
    Seen,
    Shapes,
    Spread,
    TatTerm,
    Term,
    pairs,
)
from kd.teacher import regions_of
from utils.image_networks import ImageNetwork
from utils.streams import generator, stream_seed


@torch.no_grad()
def shapes(net: ImageNetwork, channels: int, size: int) -> Shapes:
    """Of a network's pass over one image; nothing of it changes."""
    was, x = net.training, next(net.parameters()).new_zeros(1, channels, size, size)
    maps = net.eval().layers(x)
    found = Shapes(net.join(maps[-1]).shape[1], tuple(tuple(m.shape[1:]) for m in maps))
    net.train(was)
    return found


def make_term(
    name: str, cfg: KdConfig, own: Shapes, said: Shapes, labels: Tensor, classes: int, heads: dict[str, Tensor]
) -> Term:
    """The term of a method for a student and one teacher; `labels` [N] of all samples, the state of HSAKD's heads."""
    numbers = pairs(own, said)
    widths = [(own.maps[s][0], said.maps[t][0]) for s, t in numbers]
    last = [(len(own.maps) - 1, len(said.maps) - 1)]
    ends = (own.maps[-1][0], said.maps[-1][0])
    if name == "AT":
        return MapsTerm(cfg.AT.WEIGHT, numbers, hints.at_loss)
    if name == "NST":
        return MapsTerm(cfg.NST.WEIGHT, numbers, hints.nst_loss)
    if name == "SP":
        return MapsTerm(cfg.SP.WEIGHT, last, relations.sp_loss)
    if name == "FITNET":
        block = cfg.FITNET.BLOCK - 1
        if block >= len(numbers):
            raise ConfigError(
                f"FITNET.BLOCK: {block + 1}, but the networks have {len(numbers)} levels; take one of them"
            )
        part = relations.projection(*widths[block])
        if cfg.FITNET.RELU:
            part.append(nn.ReLU())
        return MapsTerm(cfg.FITNET.WEIGHT, [numbers[block]], hints.fitnet_loss, [part])
    if name == "VID":
        parts = [hints.VidHead(s, t, cfg.VID.VARIANCE) for s, t in widths]
        return MapsTerm(cfg.VID.WEIGHT, numbers, lambda found, t: hints.vid_loss(found[0], found[1], t), parts)
    if name == "ICKD":
        loss = partial(relations.ickd_loss, grid=cfg.ICKD.GRID)
        return MapsTerm(cfg.ICKD.WEIGHT, last, loss, [relations.projection(*ends)])
    if name == "RKD":
        return RowsTerm(1.0, partial(relations.rkd_loss, distance=cfg.RKD.DISTANCE, angle=cfg.RKD.ANGLE))
    if name == "PKT":
        return RowsTerm(cfg.PKT.WEIGHT, relations.pkt_loss)
    if name == "DIST":
        return DistTerm(cfg.DIST)
    if name == "TAT":
        return TatTerm(cfg.TAT, own, said)
    if name == "REVIEWKD":
        return ReviewTerm(cfg.REVIEWKD, cfg.REVIEWKD.WARMUP * cfg.share_of_epochs, own, said)
    if name == "CRD":
        return CrdTerm(cfg.CRD, own, said, labels, cfg.SEED)
    if name == "DLB":
        return DlbTerm(cfg.DLB)
    if name == "BINGO":
        return BingoTerm(cfg.BINGO, own, said, cfg.SEED)
    if name == "HSAKD":
        return HsakdTerm(cfg.HSAKD, own, said, classes, heads)
    if name == "HSAKD_TEACHER":
        return HsakdTeacherTerm(own, classes)
    return LogitTerm(cfg.loss, cfg.weights[1], cfg.warmup * cfg.share_of_epochs)


class Learner(nn.Module):
    """A student with all that is learned beside it; its output is a step's loss."""

    def __init__(
        self,
        cfg: KdConfig,
        net: ImageNetwork,
        size: int,
        channels: int,
        labels: Tensor,
        classes: int,
        teachers: Sequence[ImageNetwork],
        heads: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.net, self.regions, self.bf16 = net, (cfg.regions, cfg.SDD.BINS), cfg.SOLVER.AMP
        self.seed, self.ce_weight, self.drop = cfg.SEED, cfg.weights[0], cfg.ASSISTANTS.DROP
        own = shapes(net, channels, size)
        names = [name for name in cfg.DISTILLER.parts if name != "NONE"]
        self.policy: GlobalTemperature | InstanceTemperature | None = None
        self.temperature = torch.empty(0)  # the learned one of the last step: [1], or of samples [B]
        every: list[list[Term]] = []  # of every teacher
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(cfg.SEED, "kd terms"))
            for said in [shapes(teacher, channels, size) for teacher in teachers] or [own]:
                here = [name for name in names if not every or name not in UNTAUGHT]
                every.append([make_term(name, cfg, own, said, labels, classes, heads) for name in here])
            if cfg.CTKD:
                c = cfg.CTKD
                self.curriculum = partial(
                    curriculum, epochs=max(1, round(c.EPOCHS * cfg.share_of_epochs)), end=c.LAMBDA
                )
                limits = (c.LOWEST, c.RANGE, c.START)
                self.policy = InstanceTemperature(classes, *limits) if c.INSTANCE else GlobalTemperature(*limits)
        self.terms = nn.ModuleList(nn.ModuleList(made) for made in every)
        self.reads_rows = any(term.reads_rows for made in every for term in made)
        self.reads_maps = any(term.reads_maps for made in every for term in made)
        self.every = [tuple(made) for made in every]  # the same, typed

    def groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Parameters for the optimiser: the network's, the terms', and the temperature's, which does not decay."""
        learned = [p for p in self.terms.parameters() if p.requires_grad]
        found = [(list(self.net.parameters()), weight_decay), (learned, weight_decay)]
        found += [(list(self.policy.parameters()), 0.0)] if self.policy else []
        return [{"params": params, "weight_decay": decay} for params, decay in found if params]

    def look(self, x: Tensor) -> Pass:
        """The student's pass over inputs [B, channels, H, W]; logits are float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            maps = tuple(self.net.layers(x))
            rows = self.net.join(maps[-1]) if self.reads_rows or self.regions[0] == (1,) else maps[-1][:, :0]
            logits = self.net.head(rows).float()[..., None] if self.regions[0] == (1,) else None
        if logits is None:
            logits = regions_of(self.net, maps[-1], self.regions)
        if not self.reads_maps:  # what terms learn is in float32
            return Pass(logits, rows.float())
        return Pass(logits, rows.float(), tuple(m.float() for m in maps))

    def forward(
        self, x: Tensor, batch: Batch, said: Sequence[Pass], epoch: int, step: int, rank: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, cross-entropy and what the terms add [], logits [B, K], in epoch 1, 2, ... at a step of the run."""
        own = self.look(x)
        logits = own.logits[batch.own]
        ce = F.cross_entropy(logits, batch.labels)
        extra = torch.zeros_like(ce)
        teaches = [True] * len(self.every)
        if len(said) > 1:
            teaches = kept_teachers(len(said), self.drop, generator(self.seed, "kd teachers", step)).tolist()
        ranks = (rank,) if rank else ()
        for made, of_teacher, now in zip(self.every, said or [own], teaches, strict=True):
            learned = None
            if self.policy is not None:
                learned = self.policy(own.logits, of_teacher.logits, self.curriculum(epoch))
                self.temperature = learned.detach()
            seen = Seen(own, of_teacher, batch.labels, batch.ids, batch.fresh, step, ranks, learned, batch.again)
            for term in made:
                counts = now or not term.taught
                if not counts and not any(p.requires_grad for p in term.parameters()):
                    continue
                value = term.weight * min(epoch / max(term.warmup, 1), 1) * term(seen)
                extra = extra + (value if counts else 0 * value)  # whose parameters all have a gradient, if of 0
        return self.ce_weight * ce + extra, ce, extra, logits

    def numbers(self) -> dict[str, float]:
        """What a line of metrics says besides: the learned temperature of the last step, its mean over samples."""
        return {} if self.policy is None else {"temperature": self.temperature.mean().item()}

    def remember(self, spread: Spread) -> None:
        """After a step: what later ones need. All ranks together."""
        for made in self.every:
            for term in made:
                term.remember(spread)
