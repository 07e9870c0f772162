"""One student: its network, its optimiser, its folder; a group of them walks over the same batches together."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError
from kd.kd_batches import Batch, Batches
from kd.kd_config import KdConfig
from kd.kd_data import KdData
from kd.learner import Learner
from kd.methods.terms import Pass
from kd.scoring import hits, shares
from kd.teacher import KeptLogits, Regions, Teacher
from utils.checkpoint import keep_state, last_state, save_tensors
from utils.ddp import World
from utils.image_networks import ImageNetwork
from utils.kd_networks import kd_network
from utils.progress import Progress
from utils.run_folder import RunFolder, keep_batch, log
from utils.stopping import StopFlag, Stopped
from utils.streams import stream_seed
from utils.utils_image import ImageSet

STATE, BEST = "state.pth", "student_best.safetensors"
AGREE_STEPS = 20  # between looks of several ranks whether one of them was asked to stop


class StudentRun:
    """A student in training."""

    def __init__(
        self,
        cfg: KdConfig,
        folder: RunFolder,
        data: KdData,
        batches: Batches,
        teachers: Sequence[Teacher],
        world: World,
        heads: dict[str, Tensor] | None = None,
    ) -> None:
        """`teachers` of a run that has some; `heads`: the state of those of HSAKD's teacher."""
        self.cfg, self.folder, self.data, self.world, self.batches = cfg, folder, data, world, batches
        self.total = batches.starts[cfg.epochs]
        self.teachers = [*teachers] if cfg.distils else []
        self.regions: Regions = (cfg.regions, cfg.SDD.BINS)
        name, classes = cfg.DISTILLER.STUDENT, len(data.classes)
        net = kd_network(name, classes, data.train.channels, data.size, cfg.SEED, "kd student").to(world.device)
        self.layout = torch.channels_last if cfg.SOLVER.CHANNELS_LAST else torch.contiguous_format
        net = net.to(memory_format=self.layout)
        if cfg.SOLVER.SYNC_BN and world.size > 1:
            if world.device.type == "cpu":
                log.info("SOLVER.SYNC_BN needs GPUs; every rank normalises its own share")
            else:
                net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.net: ImageNetwork = net
        self.learner = Learner(
            cfg, net, data.size, data.train.channels, batches.labels, classes, [t.net for t in self.teachers],
            heads or {},
        ).to(world.device)  # fmt: skip
        s = cfg.SOLVER
        self.optimizer = torch.optim.SGD(self.learner.groups(s.WEIGHT_DECAY), s.LR, s.MOMENTUM)
        self.done, self.best, self.best_epoch, self.seconds = 0, -1.0, 0, 0.0
        # Of the epoch: ce, loss, hits, samples, and steps with a finite loss.
        self.sums = torch.zeros(5, dtype=torch.float64, device=world.device)
        self.resume()
        self.module: nn.Module = self.learner
        if world.size > 1:
            self.module = DistributedDataParallel(self.learner, broadcast_buffers=False)
        self.parts = shares(len(data.test), cfg.DATASET.TEST.BATCH_SIZE, world.size)[world.rank]

    @property
    def label(self) -> str:
        """Its folder's name."""
        return self.folder.folder.name

    def resume(self) -> None:
        """Take over the last state. Raises ConfigError for another run's."""
        path = self.folder.folder / STATE
        state = last_state(path) if self.world.main else None
        if not self.world.broadcast(state is not None):
            self.folder.rewind(0)
            return
        state = state or last_state(path)
        try:
            self.net.load_state_dict(state["net"])
            self.learner.terms.load_state_dict(state["terms"])
            if self.learner.policy:
                self.learner.policy.load_state_dict(state["temperature"])
            if self.batches.shrinking:
                self.batches.shrinking.load(state["shrinking"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done, self.best, self.best_epoch = state["done"], state["best"], state["best_epoch"]
            self.seconds = state["seconds"]
            if self.world.main:
                self.sums.copy_(state["sums"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(f"{path}: not a state of this run ({reason}): start again with --overwrite") from error
        self.folder.rewind(self.done)
        log.info(f"{self.label}: resumed after step {self.done} of {self.total}")

    def step(self, batch: Batch, said: Sequence[Pass], turn: int) -> None:
        """Go down on a batch, the `turn`-th of its epoch, with what the teachers said of it; never waits."""
        epoch = self.batches.place(self.done)[0] + 1
        self.module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.rate(epoch)
        rank = (self.world.rank,) if self.world.rank else ()
        torch.manual_seed(stream_seed(self.cfg.SEED, "kd dropout", self.done, *rank))
        x = batch.x.contiguous(memory_format=self.layout)
        loss, ce, extra, logits = self.module(x, batch, said, epoch, self.done, self.world.rank)
        # Ranks' gradients are averaged, their shares of the batch may differ.
        (self.batches.share(turn) * loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.remember(self.batches.spread(turn))
        with torch.no_grad():
            right = (logits.argmax(1) == batch.labels).sum()
            count = len(batch.labels)
            finite = loss.isfinite()
            self.sums += torch.stack([ce * count, extra * count, right, torch.full_like(right, count), finite]).double()
        if self.batches.shrinking:
            self.batches.shrinking.note(batch.ids[: batch.fresh], logits[: batch.fresh].detach())
        self.done += 1

    def average_buffers(self) -> None:
        """Running statistics of batch norm: the mean over ranks, which is linear in every step's share."""
        if self.world.size > 1:
            for name, buffer in self.learner.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    self.world.sum(buffer).div_(self.world.size)

    @torch.no_grad()
    def test_counts(self) -> Tensor:
        """This epoch's hits among 1 and 5, sum of NLL and samples [4], summed over ranks: every image counts once."""
        self.net.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        labels = self.data.test.labels
        for which in self.parts:
            y = labels[which].to(self.world.device)
            z = self.logits(self.data.test, which)
            sums += torch.cat(
                [hits(z, y), F.cross_entropy(z, y, reduction="sum")[None], y.new_tensor([len(y)])]
            ).double()
        return self.world.sum(sums)

    def test(self, epoch: int) -> dict[str, float]:
        """Scores of the test images after epoch 1, 2, ...; the best epoch's weights are kept. All ranks together."""
        first, five, nll, tested = self.test_counts().tolist()
        top1 = 100 * first / tested
        if top1 > self.best:
            self.best, self.best_epoch = top1, epoch
            if self.world.main:
                save_tensors(self.folder.folder / BEST, self.weights())
        return {
            "test_top1": top1, "test_top5": 100 * five / tested, "test_nll": nll / tested, "best_top1": self.best,
            "best_epoch": self.best_epoch,
        }  # fmt: skip

    def logits(self, part: ImageSet, which: Tensor) -> Tensor:
        """Float32 logits [B, K] of held-out images."""
        x = self.data.test_input(part, which, self.world.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.SOLVER.AMP):
            return self.net(x.contiguous(memory_format=self.layout)).logits.float()

    def end_epoch(self) -> None:
        """Read the sums, test, log, save. Raises ConfigError where the loss is no longer finite."""
        epoch = self.batches.place(self.done)[0]
        self.average_buffers()
        if self.batches.shrinking:
            self.batches.shrinking.end_epoch(epoch)
        ce, extra, right, count, finite = self.world.sum(self.sums).tolist()
        self.sums.zero_()
        if not math.isfinite(ce + extra):
            turn = min(int(finite) // self.world.size, len(self.batches.parts) - 1)
            batch, file = {"epoch": epoch, "samples": self.batches.parts[turn].tolist()}, "not_finite.json"
            if self.world.main:
                keep_batch(self.folder.folder, self.batches.starts[epoch - 1] + turn + 1, batch)
            raise ConfigError(
                f"{self.label}: epoch {epoch}: the loss is not finite from step {turn + 1} on (see {file}); the "
                "state of the epoch before is kept: lower SOLVER.LR or the weight of the loss"
            )
        accuracies = {} if self.cfg.views == "bags" else self.test(epoch) | {"train_top1": 100 * right / count}
        self.folder.metric(
            iteration=self.done, epoch=epoch, lr=self.optimizer.param_groups[0]["lr"], train_ce=ce / count,
            train_kd=extra / count, **accuracies, **self.learner.numbers(),
            **({"samples": self.batches.shrinking.count(epoch - 1)} if self.batches.shrinking else {}),
        )  # fmt: skip
        tops = [f" {name} {accuracies[f'{name}_top1']:.2f}" for name in ("train", "test", "best") if accuracies]
        log.info(
            f"{self.label}: epoch {epoch}/{self.cfg.epochs} ce {ce / count:.3f} kd {extra / count:.3f}{''.join(tops)}"
        )
        every = self.cfg.LOG.SAVE_CHECKPOINT_FREQ
        if self.world.main and every and epoch % every == 0 and self.done < self.total:
            save_tensors(self.folder.folder / f"student_{epoch}.safetensors", self.weights())

    def weights(self) -> dict[str, Tensor]:
        """The student's state, and nothing of the teacher's."""
        return dict(self.net.state_dict())

    def save(self) -> None:
        """Write what the run goes on from; all ranks together."""
        self.average_buffers()
        sums, policy = self.world.sum(self.sums.clone()), self.learner.policy
        shrinking = self.batches.shrinking.state() if self.batches.shrinking else {}
        if self.world.main:
            state: dict[str, Any] = {
                "net": self.weights(), "optimizer": self.optimizer.state_dict(), "done": self.done, "best": self.best,
                "best_epoch": self.best_epoch, "sums": sums.cpu(), "seconds": self.seconds,
                "terms": self.learner.terms.state_dict(), "temperature": policy.state_dict() if policy else {},
                "shrinking": shrinking,
            }  # fmt: skip
            keep_state(self.folder.folder / STATE, state)


def train_group(
    runs: Sequence[StudentRun],
    batches: Batches,
    teachers: Sequence[Teacher],
    kept: KeptLogits | None,
    flag: StopFlag,
) -> dict[str, ConfigError]:
    """Train students over the same batches on one forward of every teacher, each from where it stands; those that fail.

    Raises Stopped after a signal, with every state saved.
    """
    world, failed = batches.world, dict[str, ConfigError]()
    start, total = min(run.done for run in runs), max(run.total for run in runs)
    progress = Progress("train", total, start, world.main)
    wanted = [run.regions for run in runs if run.teachers]
    reads_maps = any(run.learner.reads_maps for run in runs)
    current = -1
    for step in range(start, total):
        began = time.monotonic()
        epoch, turn = batches.place(step)
        active = [run for run in runs if run.done == step < run.total and run.label not in failed]
        if not active:
            progress.step()
            continue
        if epoch != current:
            batches.begin(epoch)
            current = epoch
        batch = batches.get(turn)
        if kept:
            said = [kept.see(batches.view, batch.ids)]
        else:
            said = [teacher.see(batch.of_teacher, wanted, reads_maps) for teacher in teachers]
        shared, ends = time.monotonic() - began, batches.ends(step)
        for run in active:
            began = time.monotonic()
            run.step(batch, [seen[run.regions] for seen in said] if run.teachers else [], turn)
            try:
                if ends:
                    run.end_epoch()
            except ConfigError as error:  # the same on every rank; the others go on
                failed[run.label] = error
            run.seconds += time.monotonic() - began + shared  # as if it were alone
        active = [run for run in active if run.label not in failed]
        stop = 0
        if world.size == 1 or step % AGREE_STEPS == 0:
            stop = int(world.sum(torch.tensor(flag.number)))  # on the CPU: no device waits
        for run in active if ends or stop else ():
            run.save()
        if stop:
            raise Stopped(max(world.gather_values(flag.number)))
        progress.step()
    progress.close()
    return failed
