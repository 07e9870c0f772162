"""The text modality of the programs: its configuration, data, encoders and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from condense.job import Job, JobConfig
from condense.words import nearest_words
from condenser.Condenser_text import CondenseConfig, Condenser, table_name
from condenser.evaluator import StudentScore, TrainingSet, linear_baseline
from condenser.synthetic_set import SyntheticSet, checked
from condenser.synthetic_text import student_view
from utils.corpus import Corpus
from utils.ddp import World
from utils.encoder import EncoderFactory, NetworkConfig, encoder_factory, load_tokenizer
from utils.report import Block, Heading, Table
from utils.sampling import buckets
from utils.scratch_encoder import scratch_encoder
from utils.teachers import TeacherBank
from utils.utils_text import DatasetConfig, TextSet, get_loader, load_corpus


class TextConfig(JobConfig):
    """A text run."""

    dataset: DatasetConfig
    network: NetworkConfig
    condense: CondenseConfig

    @property
    def multilabel(self) -> bool:
        """Whether a document may have several labels."""
        return self.dataset.is_multilabel

    @property
    def net_name(self) -> str:
        """Kind of the encoder."""
        return self.network.net_type.lower()


class TextJob(Job):
    """Documents and encoders of a run, on this rank."""

    cfg: TextConfig
    train: TextSet
    val: TextSet
    test: TextSet
    program = "condense_script_text.py"
    unit = "uint16 token ids"

    def __init__(
        self, cfg: TextConfig, world: World, corpus: Corpus, parts: tuple[TextSet, TextSet, TextSet],
        factory: EncoderFactory, tokenizer: Any,
    ) -> None:  # fmt: skip
        self.cfg, self.world, self.corpus, self.factory, self.tokenizer = cfg, world, corpus, factory, tokenizer
        self.train, self.val, self.test = parts
        self.classes = corpus.classes
        self.table = table_name(factory.word_table)
        self.origin = {"corpus": corpus.fingerprint, "word_table": self.table}

    def fresh(self, seed: int, purpose: str, *ids: int) -> nn.Module:
        """A fresh encoder."""
        return self.factory.fresh(seed, purpose, *ids)

    def class_costs(self) -> list[float]:
        """Tokens of every class."""
        return class_costs(self.cfg.condense, self.cfg.network.max_length, self.cfg.dataset.batch_real,
                           [len(ids) for ids in self.train.members()])  # fmt: skip

    def condenser(
        self, classes: Sequence[Sequence[int]], networks: tuple[nn.Module, nn.Module], bank: TeacherBank
    ) -> Condenser:
        """The condenser of this rank's classes."""
        cfg = self.cfg
        return Condenser(
            nclass_list=classes,
            device=self.world.device,
            settings=cfg.condense,
            documents=self.train,
            networks=networks,
            bank=bank,
            table=self.factory.word_table,
            frame=(int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)),
            max_length=cfg.network.max_length,
            batch_real=cfg.dataset.batch_real,
            multilabel=cfg.multilabel,
            seed=cfg.seed,
            world=self.world,
            dataset=cfg.data_name,
        )

    def parts(self, data: TrainingSet) -> list[list[int]]:
        """Documents of like length, within the token budget."""
        return buckets(data.lengths.tolist(), self.cfg.condense.token_budget)

    def student_view(self, found: SyntheticSet, path: Path) -> TrainingSet:
        """Rows cut into their samples."""
        shape = (self.cfg.network.max_length, self.factory.word_table.shape[1])
        return student_view(checked(found, path, shape, self.cfg.nclass, word_table=self.table))

    def pictures(self, found: SyntheticSet, run: Path, folder: Path) -> list[Block]:
        """The words nearest to the first row of every class."""
        rows = nearest_words(found, self.factory.word_table, self.tokenizer, self.classes)
        caption = "the first row of every class, each embedding as the word piece nearest to it by cosine"
        return [Heading("Nearest words of the learned rows"), Table(("class", "labels", "words"), rows, caption)]

    def linear(self, which: Tensor) -> StudentScore:
        """Logistic regression on TF-IDF."""
        corpus = self.corpus
        if corpus.val is None:
            raise ValueError("linear: the corpus has no validation part")
        texts = corpus.train.texts
        return linear_baseline(
            [texts[i] for i in which.tolist()], self.train.targets[which], texts,
            (corpus.val.texts, self.val.targets), (corpus.test.texts, self.test.targets), self.cfg.multilabel,
        )  # fmt: skip


def class_costs(c: CondenseConfig, max_length: int, batch_real: int, counts: Sequence[int]) -> list[float]:
    """Tokens per iteration and class: rows forward and backward for both losses, real side over refresh."""
    real = [min(n, batch_real) for n in counts]
    # Real documents are shared out by tokens whoever owns the class; what is left of them is their embedding.
    return [3.0 * c.ipc * max_length * (1 + c.iter_calib) + 0.1 * n / c.refresh for n in real]


def open_text(cfg: TextConfig, world: World) -> TextJob:
    """Read the corpus and the encoder; rank 0 first, so that caches are built once."""
    if not world.main:
        world.barrier()
    corpus = load_corpus(cfg.dataset, cfg.cache_dir)
    folder: Path | str = cfg.network.model_path
    if cfg.network.scratch:
        n, home = cfg.network, cfg.pretrained_dir / cfg.data_name / "encoders"
        folder = scratch_encoder(home, n.preset, corpus, n.vocab_size, n.max_length)
    if world.main:
        world.barrier()
    tokenizer = load_tokenizer(folder)
    train, val, test = get_loader(corpus, tokenizer, cfg.network.max_length)
    if cfg.dataset.load_memory:
        train, val, test = (part.to(world.device) for part in (train, val, test))
    factory = encoder_factory(cfg.network, folder, cfg.nclass)
    return TextJob(cfg, world, corpus, (train, val, test), factory, tokenizer)
