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
from kd.kd_config import KdConfig
from kd.kd_data import Batches, KdData
from kd.losses import distillation_loss
from kd.scoring import hits, shares
from kd.teacher import KeptLogits, Regions, Teacher, regions_of
from utils.checkpoint import load_pth, save_pth, save_tensors
from utils.ddp import World
from utils.image_networks import ImageNetwork
from utils.kd_networks import kd_network
from utils.progress import Progress
from utils.run_folder import RunFolder, log
from utils.stopping import StopFlag, Stopped
from utils.streams import stream_seed
from utils.utils_image import ImageSet

STATE, BEST = "state.pth", "student_best.safetensors"
AGREE_STEPS = 20  # between looks of several ranks whether one of them was asked to stop


class RegionNet(nn.Module):
    """A network whose output are the logits [B, K, N] of an image's regions."""

    def __init__(self, net: ImageNetwork, regions: Regions, bf16: bool) -> None:
        super().__init__()
        self.net, self.regions, self.bf16 = net, regions, bf16

    def forward(self, x: Tensor) -> Tensor:
        """Float32 logits [B, K, N] of inputs [B, channels, H, W]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            if self.regions[0] == (1,):
                return self.net(x).logits.float()[..., None]
            maps = self.net.with_map(x)[1]
        return regions_of(self.net, maps, self.regions)


class StudentRun:
    """A student in training."""

    def __init__(
        self, cfg: KdConfig, folder: RunFolder, data: KdData, batches: Batches, teacher: Teacher | None, world: World
    ) -> None:
        self.cfg, self.folder, self.data, self.world = cfg, folder, data, world
        self.steps, self.total = batches.steps, cfg.epochs * batches.steps
        self.teacher = teacher if cfg.distils else None
        self.regions: Regions = (cfg.regions, cfg.SDD.BINS)
        self.loss = cfg.loss if cfg.distils else None
        name, purpose = cfg.DISTILLER.STUDENT, "kd student"
        net = kd_network(name, len(data.classes), data.train.channels, data.size, cfg.SEED, purpose)
        net = net.to(world.device)
        self.layout = torch.channels_last if cfg.SOLVER.CHANNELS_LAST else torch.contiguous_format
        net = net.to(memory_format=self.layout)
        if cfg.SOLVER.SYNC_BN and world.size > 1:
            if world.device.type == "cpu":
                log.info("SOLVER.SYNC_BN needs GPUs; every rank normalises its own share")
            else:
                net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.net: ImageNetwork = net
        self.module: nn.Module = RegionNet(net, self.regions, cfg.SOLVER.AMP)
        self.optimizer = torch.optim.SGD(
            net.parameters(), cfg.SOLVER.LR, cfg.SOLVER.MOMENTUM, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
        self.done, self.best, self.best_epoch, self.seconds = 0, -1.0, 0, 0.0
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # ce, loss, hits, samples of the epoch
        self.resume()
        if world.size > 1:
            self.module = DistributedDataParallel(self.module, broadcast_buffers=False)
        self.parts = shares(len(data.test), cfg.DATASET.TEST.BATCH_SIZE, world.size)[world.rank]

    @property
    def label(self) -> str:
        """Its folder's name."""
        return self.folder.folder.name

    def resume(self) -> None:
        """Take over the last state. Raises ConfigError for another run's."""
        path = self.folder.folder / STATE
        if not self.world.broadcast(path.exists()):
            return
        state = load_pth(path)
        try:
            self.net.load_state_dict(state["net"])
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

    def step(self, x: Tensor, labels: Tensor, regions: dict[Regions, Tensor], share: float) -> None:
        """Go down on views [B, C, H, W]: CE_WEIGHT CE + weight x warm-up x the method's loss; never waits."""
        epoch, (ce_weight, weight) = self.done // self.steps, self.cfg.weights
        self.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.rate(epoch + 1)
        rank = (self.world.rank,) if self.world.rank else ()
        torch.manual_seed(stream_seed(self.cfg.SEED, "kd dropout", self.done, *rank))
        logits = self.module(x.contiguous(memory_format=self.layout))
        ce = F.cross_entropy(logits[:, :, 0], labels)
        loss, extra = ce_weight * ce, torch.zeros_like(ce)
        if self.loss:
            extra = distillation_loss(logits, regions[self.regions], labels, self.loss)
            loss = loss + weight * self.cfg.warm(epoch + 1) * extra
        (share * loss).backward()  # ranks' gradients are averaged, their shares of the batch may differ
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            right = (logits[:, :, 0].argmax(1) == labels).sum()
            count = len(labels)
            self.sums += torch.stack([ce * count, extra * count, right, torch.full_like(right, count)]).double()
        self.done += 1

    def average_buffers(self) -> None:
        """Running statistics of batch norm: the mean over ranks, which is linear in every step's share."""
        if self.world.size > 1:
            for buffer in self.net.buffers():
                if buffer.is_floating_point():
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

    def logits(self, part: ImageSet, which: Tensor) -> Tensor:
        """Float32 logits [B, K] of held-out images."""
        x = self.data.test_input(part, which, self.world.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.SOLVER.AMP):
            return self.net(x.contiguous(memory_format=self.layout)).logits.float()

    def end_epoch(self) -> None:
        """Read the sums, test, log, save. Raises ConfigError where the loss is no longer finite."""
        epoch = self.done // self.steps
        self.average_buffers()
        ce, extra, right, count = self.world.sum(self.sums).tolist()
        self.sums.zero_()
        if not math.isfinite(ce + extra):
            raise ConfigError(
                f"{self.label}: epoch {epoch}: the loss is not finite; the state of the epoch before is kept: lower "
                "SOLVER.LR or the weight of the loss"
            )
        first, five, nll, tested = self.test_counts().tolist()
        top1 = 100 * first / tested
        if top1 > self.best:
            self.best, self.best_epoch = top1, epoch
            if self.world.main:
                save_tensors(self.folder.folder / BEST, self.weights())
        self.folder.metric(
            iteration=self.done, epoch=epoch, lr=self.optimizer.param_groups[0]["lr"], train_ce=ce / count,
            train_kd=extra / count, train_top1=100 * right / count, test_top1=top1, test_top5=100 * five / tested,
            test_nll=nll / tested, best_top1=self.best, best_epoch=self.best_epoch,
        )  # fmt: skip
        log.info(
            f"{self.label}: epoch {epoch}/{self.cfg.epochs} ce {ce / count:.3f} kd {extra / count:.3f} "
            f"train {100 * right / count:.2f} test {top1:.2f} best {self.best:.2f}"
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
        sums = self.world.sum(self.sums.clone())
        if self.world.main:
            state: dict[str, Any] = {
                "net": self.weights(), "optimizer": self.optimizer.state_dict(), "done": self.done, "best": self.best,
                "best_epoch": self.best_epoch, "sums": sums.cpu(), "seconds": self.seconds,
            }  # fmt: skip
            save_pth(self.folder.folder / STATE, state)


def train_group(
    runs: Sequence[StudentRun], batches: Batches, teacher: Teacher | None, kept: KeptLogits | None, flag: StopFlag
) -> dict[str, ConfigError]:
    """Train students over the same batches on one teacher forward, every one from where it stands; those that fail.

    Raises Stopped after a signal, with every state saved.
    """
    world, failed = batches.world, dict[str, ConfigError]()
    start, total = min(run.done for run in runs), max(run.total for run in runs)
    progress = Progress("train", total, start, world.main)
    wanted = [run.regions for run in runs if run.loss]
    current = -1
    for step in range(start, total):
        began = time.monotonic()
        epoch, turn = divmod(step, batches.steps)
        active = [run for run in runs if run.done == step < run.total and run.label not in failed]
        if not active:
            progress.step()
            continue
        if epoch != current:
            batches.begin(epoch)
            current = epoch
        x, labels, which = batches.get(turn)
        if kept:
            regions = kept.regions(batches.view, which)
        else:
            regions = teacher.regions(x, wanted) if teacher and wanted else {}
        for run in active:
            run.step(x, labels, regions, batches.share(turn))
        ends = turn == batches.steps - 1
        for run in active if ends else ():
            try:
                run.end_epoch()
            except ConfigError as error:  # the same on every rank; the others go on
                failed[run.label] = error
        active = [run for run in active if run.label not in failed]
        for run in active:
            run.seconds += (time.monotonic() - began) / len(active)
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
