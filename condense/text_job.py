"""What the three text programs share: their one configuration, the options short for it, data, encoder, teachers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from condenser.Condenser_text import CondenseConfig, table_name
from condenser.evaluator import EvaluationConfig
from condenser.loop import OptimizationConfig
from config import ConfigError, LocalPath, Option, Section
from config.loader import flatten
from utils.checkpoint import atomic_write
from utils.corpus import Corpus
from utils.ddp import World
from utils.encoder import EncoderFactory, NetworkConfig, TextEncoder, encoder_factory, load_tokenizer
from utils.run_folder import log, short_hash
from utils.sampling import training_batch
from utils.scratch_encoder import build_scratch_encoder
from utils.stopping import StopFlag
from utils.teachers import PretrainConfig, missing_members, share_out_training, train_member
from utils.utils_text import DatasetConfig, TextSet, get_loader, load_corpus

OPTIONS = (
    Option("ipc", "condense.ipc", "value", "documents to learn per class"),
    Option("init", "condense.init", "value", "where they start", ("random", "noise", "mix", "load")),
    Option("load_path", "condense.load_path", "path", "a saved set for --init load"),
    Option("sampling_net", "condense.sampling_net", "flag", "learn the scales of the frequencies"),
)


class TextConfig(Section):
    """The question that a run asks; every section is declared beside its reader."""

    dataset: DatasetConfig
    network: NetworkConfig
    pretrain: PretrainConfig
    optimization: OptimizationConfig
    condense: CondenseConfig
    evaluation: EvaluationConfig
    seed: int = 0
    tf32: bool = True
    debug: bool = False  # tracebacks, a log line an iteration, and only the first max(nclass // 100, 10) classes
    save_dir: LocalPath = Path("../results")
    pretrained_dir: LocalPath = Path("../pretrained_models")
    cache_dir: LocalPath = Path("../dataset/cache")

    @model_validator(mode="after")
    def check(self) -> "TextConfig":
        """Rules across sections."""
        if self.condense.teacher_model_epoch > self.pretrain.epochs:
            raise ValueError(
                f"condense.teacher_model_epoch: {self.condense.teacher_model_epoch} is after the last epoch, "
                f"pretrain.epochs: {self.pretrain.epochs}"
            )
        return self


def named(cfg: TextConfig, prefixes: Iterable[str]) -> dict[str, object]:
    """The resolved values whose dotted keys begin with one of the prefixes."""
    return {key: value for key, value in flatten(cfg).items() if key.startswith(tuple(prefixes))}


def condense_folder(cfg: TextConfig) -> Path:
    """Folder of the condensation run: readable parts and a hash of all that the result depends on."""
    c, o = cfg.condense, cfg.optimization
    values = named(cfg, ("dataset.", "network.", "pretrain.", "optimization.", "condense.", "seed", "tf32", "debug"))
    values |= {f"score.{k}": v for k, v in named(cfg, ("evaluation.",)).items() if k.split(".")[1] not in NOT_SCORE}
    name = f"{c.dis_metrics}_{o.optimizer}_lr{o.lr_img:g}_f{c.num_freqs}_{c.init}_seed{cfg.seed}_{short_hash(values)}"
    return cfg.save_dir / "condense" / "condense" / cfg.dataset.dataset / f"ipc{c.ipc}" / name


NOT_SCORE = (
    "rows",
    "repeat",
    "seeds",
    "which",
)  # of the evaluation section, what the held-out score does not read


def evaluate_folder(cfg: TextConfig) -> Path:
    """Folder of the evaluation of a run."""
    keep = {k: v for k, v in flatten(cfg).items() if not k.endswith("_dir") or k == "dataset.data_dir"}
    name = f"{condense_folder(cfg).name.rsplit('_', 1)[0]}_{short_hash(keep)}"
    return cfg.save_dir / "condense" / "evaluate" / cfg.dataset.dataset / f"ipc{cfg.condense.ipc}" / name


def bank_folder(cfg: TextConfig) -> Path:
    """Folder of the teachers: their name does not depend on ipc, so those of another ipc are taken where they exist."""
    values = named(cfg, ("dataset.", "network.", "pretrain.", "tf32")) | {"epoch": cfg.condense.teacher_model_epoch}
    values = {
        k: v for k, v in values.items() if k not in ("dataset.batch_real", "dataset.load_memory", "network.layer_index")
    }
    name = f"{cfg.network.net_type.lower()}_{short_hash(values)}"
    root = cfg.pretrained_dir / cfg.dataset.dataset
    own = root / f"ipc{cfg.condense.ipc}" / name
    others = sorted(root.glob(f"ipc*/{name}"))
    complete = [
        f for f in [own, *others] if not missing_members(f, cfg.condense.num_premodel, cfg.condense.teacher_model_epoch)
    ]
    return complete[0] if complete else own


@dataclass(frozen=True)
class TextJob:
    """Data and encoder of a run, on this rank."""

    corpus: Corpus
    train: TextSet
    val: TextSet
    test: TextSet
    factory: EncoderFactory
    tokenizer: Any


def open_text(cfg: TextConfig, world: World) -> TextJob:
    """Read the corpus and the encoder; rank 0 first, so that caches are built once."""
    if not world.main:
        world.barrier()
    corpus = load_corpus(cfg.dataset, cfg.cache_dir)
    folder: Path | str = cfg.network.model_path
    if cfg.network.scratch:
        key = short_hash(
            {"texts": corpus.fingerprint, "vocab": cfg.network.vocab_size, "length": cfg.network.max_length}
        )
        folder = cfg.pretrained_dir / cfg.dataset.dataset / "encoders" / f"{cfg.network.preset}_{key}"
        if world.main and not (folder / "config.json").exists():
            build_scratch_encoder(
                folder, cfg.network.preset, corpus.train.texts, cfg.network.vocab_size, cfg.network.max_length
            )
    if world.main:
        world.barrier()
    tokenizer = load_tokenizer(folder)
    train, val, test = get_loader(corpus, tokenizer, cfg.network.max_length)
    if cfg.dataset.load_memory:
        train, val, test = (part.to(world.device) for part in (train, val, test))
    return TextJob(corpus, train, val, test, encoder_factory(cfg.network, folder, cfg.dataset.nclass), tokenizer)


def fresh_teacher(cfg: TextConfig, job: TextJob, member: int) -> TextEncoder:
    """Teacher number `member` at its start."""
    return job.factory.fresh(cfg.pretrain.seed, "teacher init", member)


def claim_bank(folder: Path, origin: dict[str, str]) -> None:
    """Note what the teachers in a folder are trained on. Raises ConfigError for those of other documents or words."""
    path = folder / "bank.json"
    if not path.exists():
        atomic_write(path, json.dumps(origin).encode())
    elif json.loads(path.read_text()) != origin:
        raise ConfigError(
            f"{folder}: its teachers were trained on other documents or another word table (was the data changed, or a "
            "package of the docstrings corpus upgraded?): run pretrain_script_text.py with --overwrite"
        )


def ensure_teachers(cfg: TextConfig, job: TextJob, world: World, flag: StopFlag) -> Path:
    """Train the teachers that are missing, each rank its share; their folder."""
    folder = Path(world.broadcast(str(bank_folder(cfg))))
    epoch = cfg.condense.teacher_model_epoch
    if world.main:
        claim_bank(folder, {"corpus": job.corpus.fingerprint, "word_table": table_name(job.factory.word_table)})
    missing = world.broadcast(missing_members(folder, cfg.condense.num_premodel, epoch))
    if missing:
        log.info(f"training {len(missing)} of {cfg.condense.num_premodel} teachers into {folder}")
    elif folder.parent.name != f"ipc{cfg.condense.ipc}":
        log.info(f"using the teachers in {folder}")
    per_epoch = -(-len(job.train) // cfg.pretrain.batch_size)

    def train(member: int, shown: bool) -> None:
        def batch(step: int) -> Any:
            which = training_batch(job.train.lengths, cfg.pretrain.batch_size, step, cfg.pretrain.seed, member)
            return job.train.batch(which, world.device)

        train_member(
            folder, member, epoch, lambda: fresh_teacher(cfg, job, member), batch, per_epoch, cfg.pretrain,
            cfg.dataset.is_multilabel, world.device, flag, shown,
        )  # fmt: skip

    share_out_training(world, missing, train)
    return folder
