"""Train experts on the real images and keep their trajectories, which MTT and DATM match.

    python distill_feat/buffer.py --config_path config/distill_feat/buffer/digits.yaml
    torchrun --nproc_per_node=4 distill_feat/buffer.py --dataset=CIFAR100 --model=ConvNet --zca --data_path=DIR

Plain SGD on augmented images (MTT), or with --rho_max, --rho_min and --alpha flat trajectories (FTD). Ranks share out
the experts. To resume, run the same command again; a larger --num_experts adds to those that are there. --convert
takes public replay_buffer_*.pt instead of training.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from condenser.trajectory import flat_parameters, gsam_direction, set_parameters
from config import CommandLine, ConfigError, LocalPath, Option, Resolved, Section, named, nested
from distill_feat.feat_names import DATA_OPTIONS, MODELS
from utils.augment import AugType, draw_augmentation
from utils.checkpoint import drop_state, keep_state, last_state
from utils.ddp import World, assign, environment_rank, environment_size
from utils.dry_run import print_values
from utils.expert_buffers import ExpertNotes, ExpertWriter, convert_replay, expert_file, parameters_of
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.init_script import init_script
from utils.losses import task_loss
from utils.normaliser import Zca, load_zca
from utils.program import leave, run_program
from utils.progress import Progress
from utils.run_folder import RunFolder, claim, keep_batch, log, short_hash
from utils.stopping import StopFlag, stop_flag
from utils.streams import generator
from utils.utils_image import ImageCorpus, ImageDatasetConfig, ImageSet, load_images
from utils.zca import fit_zca, whitened, zca_sha256, zca_size

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "config" / "distill_feat" / "buffer" / "base.yaml"
PASS = 512  # validation images at once
WAIT = 0.5  # seconds between looks for the other ranks' experts
# The requirement's flags.
OPTIONS = (
    *DATA_OPTIONS,
    Option("model", "network.net_type", "value", "network, named after --dataset", tuple(MODELS), MODELS),
    Option("buffer_path", "buffer_path", "path", "folder of all experts"),
    Option("num_experts", "experts.num_experts", "value", "experts to train"),
    Option("train_epochs", "experts.train_epochs", "value", "epochs of an expert"),
    Option("zca", "zca", "flag", "whiten the images"),
    Option("lr_teacher", "experts.lr_teacher", "value", "step size"),
    Option("mom", "experts.mom", "value", "momentum"),
    Option("batch_train", "experts.batch_train", "value", "images of a step"),
    Option("rho_max", "experts.rho_max", "value", "radius of FTD's perturbation"),
    Option("rho_min", "experts.rho_min", "value", "as --rho_max: rho follows the step size, which is constant"),
    Option("alpha", "experts.alpha", "value", "FTD's weight of the gradient across the perturbed one"),
    Option("convert", "convert", "path", "a public replay_buffer_*.pt, or a folder of them, to take instead"),
)  # fmt: skip


class ExpertConfig(Section):
    """How experts are trained, and which of their epochs are kept."""

    num_experts: int = Field(100, ge=1)
    train_epochs: int = Field(50, ge=1)
    lr_teacher: float = Field(0.01, gt=0)
    mom: float = Field(0.0, ge=0, lt=1)
    batch_train: int = Field(256, ge=1)
    aug_type: AugType = "color/crop/cutout/flip/scale/rotate"  # DSA: one of them a batch, each image its own numbers
    rho_max: float | None = Field(None, ge=0)  # None: plain SGD (MTT)
    rho_min: float | None = Field(None, ge=0)
    alpha: float = Field(0.3, ge=0)
    first_epoch: int = Field(0, ge=0)  # epochs kept, of 0 to train_epochs
    last_epoch: int | None = Field(None, ge=1)  # None: train_epochs; training ends here
    seed: int = 0

    @model_validator(mode="after")
    def check(self) -> "ExpertConfig":
        """Cross-field rules."""
        if self.rho_max != self.rho_min:
            raise ValueError(
                f"rho_max: {self.rho_max} and rho_min: {self.rho_min}, but the step size is constant and rho with it; "
                "give both the same"
            )
        if not self.first_epoch < self.last <= self.train_epochs:
            raise ValueError(
                f"first_epoch: {self.first_epoch} and last_epoch: {self.last} of train_epochs: {self.train_epochs}; "
                "keep two epochs or more of those"
            )
        return self

    @property
    def last(self) -> int:
        """The last epoch that is trained and kept."""
        return self.train_epochs if self.last_epoch is None else self.last_epoch


class BufferConfig(Section):
    """A run of experts."""

    dataset: ImageDatasetConfig
    network: ImageNetworkConfig
    experts: ExpertConfig = ExpertConfig()
    zca: bool = False
    convert: LocalPath | None = None
    tf32: bool = True
    debug: bool = False  # tracebacks
    buffer_path: LocalPath = Path("../pretrained_models/experts")

    @model_validator(mode="after")
    def check(self) -> "BufferConfig":
        """ImageNet is all of it or a subset."""
        if self.dataset.dataset == "imagenet" and self.dataset.nclass == 10:
            raise ValueError(
                "dataset: imagenet has 1000 classes, dataset.nclass is 10; name ten of them after it, as in "
                "--dataset=ImageNet --subset=imagefruit, or set dataset.nclass: 1000"
            )
        return self


def identity(cfg: BufferConfig) -> dict[str, object]:
    """What makes experts those that they are."""
    values = named(cfg, ("dataset.", "network.", "experts.", "zca", "convert", "tf32"))
    elsewhere = ("dataset.batch_real", "dataset.load_memory", "dataset.data_dir", "experts.num_experts")
    return {key: value for key, value in values.items() if key not in elsewhere}


def expert_folder(cfg: BufferConfig) -> Path:
    """Folder of the experts of one kind."""
    kinds = {"_zca": cfg.zca, "_flat": cfg.experts.rho_max is not None, "_converted": cfg.convert is not None}
    name = f"{cfg.network.net_type}{cfg.network.depth}" + "".join(kind for kind, given in kinds.items() if given)
    return cfg.buffer_path / cfg.dataset.dataset / f"{name}_{short_hash(identity(cfg))}"


def fresh(cfg: BufferConfig, channels: int, expert: int) -> ImageNetwork:
    """An expert as it starts. Raises ConfigError for images that the network cannot take."""
    d = cfg.dataset
    return image_network(cfg.network, channels, d.size, d.nclass, cfg.experts.seed, "expert", expert)


def notes_of(cfg: BufferConfig, channels: int, zca: Zca | None) -> ExpertNotes:
    """What every expert of this configuration says of itself."""
    e, sha256 = cfg.experts, zca.sha256 if zca else ""
    return ExpertNotes(
        dataset=cfg.dataset.dataset, zca=sha256, parameters=parameters_of(fresh(cfg, channels, 0)),
        first=e.first_epoch, last=e.last, settings=identity(cfg),
    )  # fmt: skip


def has_experts(folder: Path, cfg: BufferConfig) -> bool:
    """Whether all are there."""
    return all(expert_file(folder, number).exists() for number in range(cfg.experts.num_experts))


def plan(resolved: Resolved[BufferConfig]) -> None:
    """Print values, each rank's share and the bytes on disk (rank 0); starts nothing."""
    if environment_rank():
        return
    cfg = resolved.config
    d, count = cfg.dataset, cfg.experts.num_experts
    print_values(resolved, expert_folder(cfg))
    if d.absent:
        print(f"dataset.data_dir: {d.data_dir} is absent; nothing can be trained before it is there")
    for rank, part in enumerate(assign([1.0] * count, environment_size())):
        print(f"rank {rank}: {len(part)} experts")
    rows, size = notes_of(cfg, d.channels, None).shape
    whitening = 8 * zca_size(d.channels, d.size) ** 2 if cfg.zca else 0
    free = shutil.disk_usage(next(p for p in (cfg.buffer_path, *cfg.buffer_path.parents) if p.exists())).free
    print(
        f"storage: {count} experts of {rows} snapshots of {size} weights take {4e-9 * count * rows * size:.3g} GB, the "
        f"whitening {1e-9 * whitening:.2g} GB; {1e-9 * free:.3g} GB are free"
    )


def transform(folder: Path, train: ImageSet, world: World) -> Zca:
    """The folder's whitening, fitted by rank 0 where it is not there. Raises ConfigError for too large images."""
    path = folder / "zca.safetensors"
    zca_size(train.channels, train.size)
    if world.main and not path.exists():
        log.info(f"fitting the whitening to {len(train)} images")
        fit_zca(train, world.device).save(path)
    world.barrier()
    return load_zca(path, zca_sha256(train))


def reader(part: ImageSet, zca: Zca | None, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What gives the inputs [B, C, H, W] and targets [B, classes] of samples [B]."""
    if zca is None:
        return lambda which: part.batch(which, device)
    white, targets = whitened(part, zca, device), part.targets.to(device)
    return lambda which: (white[which.to(device)], targets[which.to(device)])


def loss_gradient(net: ImageNetwork, x: Tensor, targets: Tensor, at: Tensor) -> Tensor:
    """Gradient [P] of the mean cross-entropy at the parameters `at` [P], which the network then has."""
    set_parameters(net, at)
    loss = task_loss(net(x).logits, targets, multilabel=False).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


class ExpertJob:
    """Experts of a run on this rank."""

    def __init__(
        self, cfg: BufferConfig, folder: Path, corpus: ImageCorpus, zca: Zca | None, world: World, flag: StopFlag
    ) -> None:
        self.cfg, self.folder, self.world, self.flag = cfg, folder, world, flag
        self.channels, self.counts = corpus.train.channels, (len(corpus.train), len(corpus.val))
        parts = (p.to(world.device) if cfg.dataset.load_memory else p for p in (corpus.train, corpus.val))
        self.read, self.read_val = (reader(part, zca, world.device) for part in parts)
        self.notes = notes_of(cfg, self.channels, zca)

    def train(self, expert: int) -> float:
        """Train one and write its file, from its last epoch if it was begun; percent of validation that it gets right.

        Raises Stopped on a signal, ConfigError where the weights are no longer finite.
        """
        e, path = self.cfg.experts, expert_file(self.folder, expert)
        state_file, writer = path.with_suffix(".pth"), ExpertWriter(path, self.notes)
        net = fresh(self.cfg, self.channels, expert).to(self.world.device).train()
        w = flat_parameters(net)
        speed, epoch = torch.zeros_like(w), 0
        state = last_state(state_file)
        try:
            if state is not None and writer.reaches(state["epoch"]):
                w, speed, epoch = state["w"].to(w).view_as(w), state["speed"].to(w).view_as(w), state["epoch"]
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"{state_file}: not a state of this expert ({error}): delete it") from error
        if epoch:
            log.info(f"expert {expert}: resumed after epoch {epoch}")
        else:
            writer.put(0, w)
        steps = -(-self.counts[0] // e.batch_train)
        progress = Progress(f"expert {expert}", e.last * steps, epoch * steps, self.world.main)
        while epoch < e.last:
            order = torch.randperm(self.counts[0], generator=generator(e.seed, "expert order", expert, epoch))
            finite = torch.zeros((), dtype=torch.long, device=w.device)  # steps of this epoch; read at its end
            for step, which in enumerate(order.split(e.batch_train)):
                self.flag.check()
                x, targets = self.read(which)
                gen = generator(e.seed, "expert augmentation", expert, epoch, step)
                slope = partial(loss_gradient, net, draw_augmentation(e.aug_type, len(x), gen)(x), targets)
                direction = slope(w) if e.rho_max is None else gsam_direction(slope, w, e.rho_max, e.alpha)
                speed = e.mom * speed + direction
                w = w.add(speed, alpha=-e.lr_teacher)
                finite += w.isfinite().all()
                progress.step()
            epoch += 1
            if (step := int(finite)) < steps:
                batch = {"expert": expert, "epoch": epoch, "samples": order.split(e.batch_train)[step].tolist()}
                seen = keep_batch(self.folder, (epoch - 1) * steps + step + 1, batch)
                raise ConfigError(
                    f"expert {expert}: its weights are not finite from step {step + 1} of epoch {epoch} on (its batch: "
                    f"{seen}): lower lr_teacher ({e.lr_teacher}), mom or rho"
                )
            writer.put(epoch, w)
            keep_state(state_file, {"w": w, "speed": speed, "epoch": epoch})
        progress.close()
        writer.finish()
        drop_state(state_file)
        set_parameters(net, w)
        return self.accuracy(net)

    @torch.no_grad()
    def accuracy(self, net: ImageNetwork) -> float:
        """Percent of validation."""
        net.eval()
        hits = 0
        for which in torch.arange(self.counts[1]).split(PASS):
            x, targets = self.read_val(which)
            hits += int((net(x).logits.argmax(1) == targets.argmax(1)).sum())
        return 100 * hits / self.counts[1]


def make(resolved: Resolved[BufferConfig], command: CommandLine) -> None:
    """Train the experts that are missing, or convert public ones."""
    cfg = resolved.config
    if command.dry_run:
        plan(resolved)
        return
    with init_script(command.gpu, cfg.tf32, cfg.experts.seed, cfg.debug) as world, stop_flag() as flag:
        folder, every = expert_folder(cfg), range(cfg.experts.num_experts)
        if world.broadcast(not command.overwrite and has_experts(folder, cfg)):
            log.info(f"finished already: {folder} (--overwrite starts again)")
            return
        run = RunFolder(folder, nested(cfg), world, command.overwrite)  # holds the folder's lock
        folder = run.folder
        missing = world.broadcast([i for i in every if not expert_file(folder, i).exists()])
        if not missing:
            log.info(f"finished by another process: {folder}")
            return
        corpus = load_images(cfg.dataset)
        if world.main:
            claim(folder, {"images": corpus.fingerprint})
        zca = transform(folder, corpus.train, world) if cfg.zca else None
        if cfg.convert:
            count = convert_replay(cfg.convert, folder, notes_of(cfg, corpus.train.channels, zca)) if world.main else 0
            log.info(f"experts converted: {count}, {folder}")
            return
        job = ExpertJob(cfg, folder, corpus, zca, world, flag)
        own = [job.train(missing[i]) for i in world.share([1.0] * len(missing))]
        while not all(expert_file(folder, i).exists() for i in missing):  # longer than a process group may wait
            flag.check()
            time.sleep(WAIT)
        scores: list[float] = sum(world.gather_values(own), [])
        mean, least, most = sum(scores) / len(scores), min(scores), max(scores)
        log.info(
            f"experts trained: {len(scores)}, validation accuracy {mean:.1f} ({least:.1f} to {most:.1f}) %: {folder}"
        )


TAKES = (BufferConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", HERE, *TAKES, make, DEFAULT)


if __name__ == "__main__":
    leave(main())
