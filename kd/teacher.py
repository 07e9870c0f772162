"""The frozen teacher: where its file lies, its region logits, and the same kept for views that come again."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from config import ConfigError
from kd.kd_batches import Batches
from kd.kd_config import KdConfig
from kd.kd_data import KdData
from kd.methods.terms import Pass
from kd.places import HEADS, LAST, links, run_folder, teacher_folder
from kd.regions import Bins, pool_matrix, region_logits
from utils.checkpoint import load_tensors
from utils.image_networks import ImageNetwork
from utils.kd_networks import kd_network, load_public
from utils.progress import Progress

Regions = tuple[tuple[int, ...], Bins]  # scales, and how cells are cut


def teacher_file(cfg: KdConfig) -> Path:
    """TEACHER_PATH, or the teacher's file at the requirement's place. Raises ConfigError where there is none."""
    d = cfg.DISTILLER
    name = (d.TEACHER or "").removesuffix("_sdd")
    folder = teacher_folder(cfg, name)
    short, _, phase = folder.name.rpartition("_")
    spellings = dict.fromkeys((short, name.replace("wrn_", "wrn")))
    places = [d.TEACHER_PATH] if d.TEACHER_PATH else [
        folder.with_name(f"{n}_{phase}") / file
        for n in spellings
        for file in (f"{n}.safetensors", f"{n}_best.pth", "ckpt_epoch_240.pth", f"{n}.pth")
    ]  # fmt: skip
    for place in places:
        if place.is_file():
            return place
    alone = "HSAKD_TEACHER" if phase == "hsakd" else "NONE"
    train = f"DISTILLER.TYPE {alone} DISTILLER.STUDENT {name} EXPERIMENT.SAVE_AS_TEACHER true"
    fetch = {
        "cifar100": "fetch it with bash scripts/fetch_pretrained_teachers.sh",
        "cub200": f"put {name}_best.pth there",
    }.get(cfg.DATASET.TYPE, "name a file as DISTILLER.TEACHER_PATH")
    raise ConfigError(
        f"{d.TEACHER_PATH or folder}: no teacher {name} there: train it (kd/train.py, the same config and {train}), "
        f"or {fetch}"
    )


def teacher_files(cfg: KdConfig) -> list[tuple[str, Path]]:
    """(network, file) of those that teach a run, large first: TEACHER and the assistants, or the last. ConfigError."""
    found = [(cfg.DISTILLER.TEACHER or "", teacher_file(cfg))]
    found += [(link.DISTILLER.STUDENT, run_folder(link) / LAST) for link in links(cfg)[:-1]]
    return found if cfg.ASSISTANTS.DENSE else found[-1:]


def teacher_heads(path: Path) -> dict[str, Tensor]:
    """The state of HSAKD's heads beside a teacher's file. Raises ConfigError where there are none."""
    path = path.with_name(HEADS)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file, but HSAKD reads its teacher's heads: train the teacher by DISTILLER.TYPE "
            "HSAKD_TEACHER EXPERIMENT.SAVE_AS_TEACHER true"
        )
    return load_tensors(path)


def regions_of(net: ImageNetwork, maps: Tensor, key: Regions) -> Tensor:
    """Logits [B, K, N] of the regions of last maps [B, C, H, W]: by one matrix product where what follows is linear."""
    head = net.classifier
    if isinstance(head, nn.Linear):
        return region_logits(maps, head, *key)
    cells = pool_matrix(maps.shape[2], maps.shape[3], *key).to(maps) @ maps.flatten(2).mT  # [B, N, C]
    return head(cells.flatten(0, 1)).unflatten(0, cells.shape[:2]).float().mT


def sha256(path: Path) -> str:
    """Sixteen hex digits of a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Teacher:
    """A network that only looks on: a plain module in evaluation mode, without gradients."""

    def __init__(self, name: str, path: Path, data: KdData, bf16: bool, device: torch.device) -> None:
        """The network of that name with the weights of a file. Raises ConfigError for another network's file."""
        self.net: ImageNetwork = kd_network(name, len(data.classes), data.train.channels, data.size, 0, "kd teacher")
        load_public(name, path, self.net)
        self.net.requires_grad_(False).eval()
        if type(self.net) is ImageNetwork:  # of whose blocks all can be traced; frozen norms become weights
            self.net.blocks = nn.ModuleList(fuse(block) for block in self.net.blocks)
        self.net.to(device).to(memory_format=torch.channels_last)
        self.device, self.bf16 = device, bf16

    @torch.no_grad()
    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map [B, C, H, W] after every block, of inputs [B, channels, size, size]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return tuple(self.net.layers(x.contiguous(memory_format=torch.channels_last)))

    @torch.no_grad()
    def see(self, x: Tensor, wanted: Iterable[Regions], reads_maps: bool = True) -> dict[Regions, Pass]:
        """A float32 pass of inputs for every set of regions, from one forward; no maps if nothing reads them."""
        maps = self.maps(x)
        last = maps[-1].float()
        kept = (*(m.float() for m in maps[:-1]), last) if reads_maps else ()
        rows = self.net.join(last)
        return {key: Pass(regions_of(self.net, last, key), rows, kept) for key in set(wanted)}


class KeptLogits:
    """A teacher's region logits of n fixed views of every training image, in float16 [n, N, K, R].

    R: the cells of the finest common grid, from which all scales follow, or the regions where these are fewer. Every
    rank has them all, for the samples of its batches are anyone's.
    """

    def __init__(self, teacher: Teacher, batches: Batches, wanted: Iterable[Regions], shown: bool) -> None:
        keys = sorted(set(wanted))
        bins: set[Bins] = {kind for _, kind in keys}
        scales = tuple(sorted({m for found, _ in keys for m in found}))
        grid = math.lcm(*scales)
        if len(bins) > 1:
            raise ConfigError("KD.CACHE_VIEWS: the group has SDD.BINS exact and adaptive; run them apart")
        linear = isinstance(teacher.net.classifier, nn.Linear)
        cells = linear and "exact" in bins and grid**2 < sum(m * m for m in scales)
        kept: Regions = ((grid,) if cells else scales, bins.pop())
        first = {m: sum(s * s for s in scales if s < m) for m in scales}
        self.rules: dict[Regions, Tensor] = {}  # [N, R] that gives the regions of what is kept
        for key in keys:
            columns = torch.cat([torch.arange(first[m], first[m] + m * m) for m in key[0]])
            rule = pool_matrix(grid, grid, key[0]) if cells else torch.eye(sum(m * m for m in scales))[columns]
            self.rules[key] = rule.float().to(teacher.device)
        count, views = len(batches.train), batches.fixed
        progress = Progress("teacher's views", views * count, shown=shown)
        self.kept: Tensor | None = None
        for view in range(views):
            batches.begin(view)
            for which in torch.arange(count, device=teacher.device).split(max(batches.batch, 256)):
                found = teacher.see(batches.input(which), [kept], reads_maps=False)[kept].regions
                if self.kept is None:
                    self.kept = found.new_empty((views, count, *found.shape[1:]), dtype=torch.float16)
                self.kept[view, which] = found.half()
                progress.step(len(which))
        progress.close()

    def see(self, view: int, which: Tensor) -> dict[Regions, Pass]:
        """A pass, of which only logits are known, of a view of samples [B] for every set of regions."""
        if self.kept is None:
            raise ValueError("KeptLogits: no views")
        found = self.kept[view, which].float()
        return {key: Pass(found @ rule.T, found[:, 0, :0]) for key, rule in self.rules.items()}
