"""Distil a small text classifier from a larger one, by kd.distilltool: the toolkit's worked example.

    python kd/distill_text.py --config_path config/kd/text/docstrings.yaml                       # no download
    python kd/distill_text.py --config_path config/kd/text/ag_news.yaml dataset.data_dir=FOLDER

A BERT from nothing is trained on all training documents; students of fewer layers learn from some of them: alone, or
also from the teacher's logits, hidden states and attentions, each from drawn weights or from copied layers. Every arm
tries the same learning rates; validation chooses. The same command resumes. Teachers stay in pretrained_dir and serve
every student, also after --overwrite; `student/` in the run folder loads with transformers.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from config import CommandLine, ConfigError, Resolved, nested
from kd.distilltool import (
    BasicTraining,
    Distillation,
    HuggingFaceAdaptor,
    TrainingConfig,
    expose_attentions,
    init_student_from_layers,
)
from kd.teacher import sha256
from kd.text_config import ARMS, Arm, DistillTextConfig, Model, run_folder, teacher_folder
from utils.checkpoint import atomic_write, load_tensors, save_tensors
from utils.corpus import Corpus
from utils.ddp import World
from utils.dry_run import print_values
from utils.encoder import TextInput, load_pretrained, load_tokenizer
from utils.fit import predict, rate
from utils.init_script import init_script
from utils.metrics import best_threshold, probabilities, score
from utils.program import leave, run_program
from utils.report import Block, Heading, Paragraph, Picture, Table, loss_curve, plain_table, write_report
from utils.run_folder import REPOSITORY, RESULT, RunFolder, claim, log, short_hash
from utils.sampling import buckets
from utils.scratch_encoder import build_scratch_encoder
from utils.stopping import StopFlag, stop_flag
from utils.streams import generator, stream_seed
from utils.utils_text import TextSet, get_loader, load_corpus

TOKENS = 16384  # of a forward pass that scores
SAVES = 5  # of a training, to resume from
TIMED, ROUNDS = 512, 7  # documents of a speed, times that it is taken
Found = dict[str, float]


def scratch_folder(cfg: DistillTextConfig, width: str, corpus: Corpus) -> Path:
    """A scratch encoder of that width, built unless it is there: its word pieces, word vectors and sizes are used."""
    key = short_hash({"texts": corpus.fingerprint, "vocab": cfg.vocab_size, "length": cfg.max_length})
    folder = cfg.pretrained_dir / cfg.dataset.dataset / "encoders" / f"{width}_{key}"
    if not (folder / "config.json").exists():
        build_scratch_encoder(folder, width, corpus.train.texts, cfg.vocab_size, cfg.max_length)
    return folder


class Called(nn.Module):
    """A classifier of transformers as a function of TextInput."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: TextInput) -> Any:
        """Its outputs."""
        return self.model(x.tokens, attention_mask=x.mask)


class Fit(NamedTuple):
    """One training: of the teacher (arm None) or of a student."""

    folder: Path
    arm: Arm | None
    lr: float
    seed: int

    @property
    def weights(self) -> Path:
        """File of the trained weights."""
        return self.folder / "model.safetensors"


@dataclass(frozen=True)
class TextLab:
    """Documents, and what trains and scores on them."""

    cfg: DistillTextConfig
    world: World
    flag: StopFlag
    corpus: Corpus
    parts: tuple[TextSet, TextSet, TextSet]  # train, val, test
    scratch: dict[str, Path]  # folders of scratch encoders by width

    def fresh(self, settings: Model, seed: int) -> Any:
        """A BertForSequenceClassification with drawn weights and the scratch encoder's word vectors."""
        from transformers import AutoModel, BertConfig, BertForSequenceClassification

        folder = self.scratch[settings.width]
        sizes = BertConfig.from_pretrained(
            folder, num_hidden_layers=settings.layers, hidden_dropout_prob=settings.dropout,
            id2label=dict(enumerate(self.corpus.classes)), label2id={n: i for i, n in enumerate(self.corpus.classes)},
            problem_type=f"{'multi' if self.corpus.multilabel else 'single'}_label_classification",
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "text model", settings.layers))
            model = BertForSequenceClassification(sizes)
            table = load_pretrained(AutoModel, folder).get_input_embeddings().weight
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(table)
        return model.to(self.world.device)

    def loaded(self, settings: Model, weights: Path) -> Any:
        """A trained model in evaluation mode."""
        model = self.fresh(settings, 0)
        model.load_state_dict(load_tensors(weights, self.world.device))
        return model.eval()

    def adaptor(self, attention: Literal["log", "probabilities"] | None) -> Callable[[Any, Any], dict[str, Any]]:
        """The toolkit's adaptor; a loss of several labels is summed over them, as the logit loss `bce` is."""
        adapt = HuggingFaceAdaptor(attention)
        labels = len(self.corpus.classes) if self.corpus.multilabel else 1

        def adapted(batch: Any, outputs: Any) -> dict[str, Any]:
            return adapt(batch, outputs) | {"losses": [outputs.loss * labels]}

        return adapted

    def loader(self, fit: Fit, settings: Model) -> DataLoader[int]:
        """Shuffled batches {input_ids, attention_mask [B, S], labels [B] or [B, C]} of a training's documents."""
        train = self.parts[0]
        which = torch.arange(len(train))
        if fit.arm and self.cfg.student.documents:
            shuffled = torch.randperm(len(train), generator=generator(fit.seed, "student documents"))
            which = shuffled[: self.cfg.student.documents]

        def collate(samples: list[int]) -> dict[str, Tensor]:
            x, targets = train.batch(torch.tensor(samples), self.world.device)
            labels = targets if self.corpus.multilabel else targets.argmax(1)
            return {"input_ids": x.tokens, "attention_mask": x.mask, "labels": labels}

        order = generator(fit.seed, "training order")
        ids: Any = which.tolist()  # a list will do as a data set
        return DataLoader(ids, settings.batch_size, True, collate_fn=collate, generator=order)

    def train(self, fit: Fit, settings: Model, teacher: nn.Module | None) -> Any:
        """The trained model; goes on from the last save."""
        cfg, model, loader = self.cfg, self.fresh(settings, fit.seed), self.loader(fit, settings)
        if teacher and fit.arm in ("copied", "distilled"):
            init_student_from_layers(teacher, model, cfg.student.copied_layers)
        training = TrainingConfig(
            output_dir=str(fit.folder / "saves"), log_dir=str(fit.folder), device=str(self.world.device), resume=True,
            ckpt_epoch_frequency=math.ceil(settings.epochs / SAVES),
        )  # fmt: skip
        steps = training.total_steps(len(loader), settings.epochs)
        show = {}
        if teacher and fit.arm in ("distilled_drawn", "distilled"):
            show = {"output_hidden_states": True, "output_attentions": cfg.attention is not None}
            if cfg.attention:
                expose_attentions(model)
            adapt = self.adaptor(cfg.attention)
            learner: Any = Distillation(training, cfg.distill, teacher, model, adapt, adapt)
        else:
            learner = BasicTraining(training, model, self.adaptor(None))

        def schedule(optimizer: Optimizer) -> LRScheduler:
            return LambdaLR(optimizer, lambda step: rate(step, steps, settings.warmup))

        torch.manual_seed(stream_seed(fit.seed, "dropout"))
        optimizer = AdamW(model.parameters(), fit.lr, weight_decay=settings.weight_decay)
        learner.train(optimizer, schedule, loader, settings.epochs, lambda model, step: self.flag.check(), **show)
        return model

    def scores(self, model: nn.Module) -> Found:
        """Of validation and test, in percent; the threshold of several labels is chosen on validation."""
        device, several = self.world.device, self.corpus.multilabel
        probs = []
        for part in self.parts[1:]:
            places = buckets(part.lengths.tolist(), TOKENS)
            logits = predict(Called(model), lambda ids, part=part: part.input(ids, device), places, len(part))  # type: ignore[misc]
            probs.append(probabilities(logits, several))
        threshold = best_threshold(probs[0], self.parts[1].targets) if several else 0.5
        found = {"threshold": threshold}
        for name, p, part in zip(("val", "test"), probs, self.parts[1:], strict=True):
            scores = score(p, part.targets, several, threshold).as_dict()
            found |= {f"{name}_{key}": value for key, value in scores.items()}
        return found

    def result(self, fit: Fit, settings: Model, teacher: nn.Module | None = None) -> Found:
        """Scores of a training, which is run unless it is finished."""
        path = fit.folder / RESULT
        if not path.exists():
            self.flag.check()
            log.info(f"{fit.folder.name}: {settings.layers} layers, learning rate {fit.lr:g}")
            began = time.monotonic()
            model = self.train(fit, settings, teacher)
            found = {"lr": fit.lr, "seconds": time.monotonic() - began} | self.scores(model)
            save_tensors(fit.weights, model.state_dict())
            atomic_write(path, json.dumps(found, indent=1).encode())
            shutil.rmtree(fit.folder / "saves")
            log.info(f"{fit.folder.name}: validation {found['val_micro']:.2f}")
        return dict(json.loads(path.read_text()))

    def teacher(self) -> tuple[Path, Found]:
        """File and scores of the teacher, trained unless it is there."""
        cfg, world = self.cfg, self.world
        folder = teacher_folder(cfg, self.corpus.fingerprint)
        done = folder / RESULT
        if not done.exists():
            home = RunFolder(folder, nested(cfg), world)
            fits = [Fit(folder / f"teacher_lr{lr:g}", None, lr, cfg.seed) for lr in cfg.teacher.lr]
            found = [self.result(fit, cfg.teacher) for fit in fits]
            best = max(range(len(fits)), key=lambda i: found[i]["val_micro"])
            save_tensors(folder / "model.safetensors", load_tensors(fits[best].weights))
            home.finish(found[best])
        log.info(f"teacher: {folder}")
        return folder / "model.safetensors", dict(json.loads(done.read_text()))


def open_lab(cfg: DistillTextConfig, world: World, flag: StopFlag) -> TextLab:
    """Read, or build, documents and word pieces."""
    corpus = load_corpus(cfg.dataset, cfg.cache_dir)
    if corpus.multilabel and cfg.distill.kd_loss_type == "ce":
        raise ConfigError(
            f"distill.kd_loss_type: ce, but documents of {corpus.name} have several labels: set bce or mse"
        )
    scratch: dict[str, Path] = {
        width: scratch_folder(cfg, width, corpus) for width in {cfg.teacher.width, cfg.student.width}
    }
    train, val, test = get_loader(corpus, load_tokenizer(scratch[cfg.student.width]), cfg.max_length)
    if cfg.dataset.load_memory:
        train, val, test = (part.to(world.device) for part in (train, val, test))
    return TextLab(cfg, world, flag, corpus, (train, val, test), scratch)


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


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`81.20 ± 0.31`: mean and deviation, of one value no deviation."""
    dev = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{dev}"


def gain(values: Sequence[float], base: Sequence[float]) -> str:
    """Mean and standard error of the paired differences, seed by seed."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.2f}{error}"


def distil(resolved: Resolved[DistillTextConfig], command: CommandLine) -> None:
    """One run: teacher, students, table."""
    cfg = resolved.config
    if command.dry_run:
        print_values(resolved, run_folder(cfg))
        s = cfg.student
        print(f"students: {len(s.arms)} arms x {len(s.lr)} learning rates x {len(s.seeds)} seeds")
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        if world.size > 1:
            raise ConfigError(
                f"torchrun: {world.size} processes, but one trains all students of a run: start it without"
            )
        folder = RunFolder(run_folder(cfg), nested(cfg), world, command.overwrite)
        if not folder.said_finished():
            finish(open_lab(cfg, world, flag), folder)


def finish(lab: TextLab, folder: RunFolder) -> None:
    """Train what is not trained yet, and write the table."""
    cfg, s = lab.cfg, lab.cfg.student
    path, of_teacher = lab.teacher()
    claim(folder.folder, {"corpus": lab.corpus.fingerprint, "teacher": sha256(path)})
    teacher = lab.loaded(cfg.teacher, path)
    if cfg.attention:
        expose_attentions(teacher)
    fits = {
        (arm, lr): [Fit(folder.folder / "students" / f"{arm}_lr{lr:g}_seed{seed}", arm, lr, seed) for seed in s.seeds]
        for arm in s.arms
        for lr in s.lr
    }
    found = {key: [lab.result(fit, s, teacher) for fit in some] for key, some in fits.items()}
    held = {key: mean(x["val_micro"] for x in rows) for key, rows in found.items()}
    chosen = {arm: max(((arm, lr) for lr in s.lr), key=held.__getitem__) for arm in s.arms}
    last = chosen["distilled" if "distilled" in s.arms else s.arms[-1]]
    kept = fits[last][max(range(len(s.seeds)), key=lambda i: found[last][i]["val_micro"])]
    models = {"teacher": lab.loaded(cfg.teacher, path), "student": lab.loaded(s, kept.weights)}
    export(lab, models["student"], folder.folder / "student")
    rates = dict(zip(models, speeds([*models.values()], lab.parts[2], s.batch_size, lab.world.device), strict=True))
    rows = {arm: found[chosen[arm]] for arm in s.arms}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    size = Table(
        ("model", "layers", "parameters", "MB", "documents per second"),
        tuple((name, str(settings.layers), f"{sizes[name]:,}", f"{sizes[name] * 4e-6:.1f}", spread(rates[name], 0))
              for name, settings in (("teacher", cfg.teacher), ("student", s))),
        f"Size in float32; speed on {lab.world.device.type}, {torch.get_num_threads()} thread(s), batches of "
        f"{s.batch_size} of at most {cfg.max_length} tokens, in turns, mean and deviation of {ROUNDS} rounds; "
        f"the student is {mean(rates['student']) / mean(rates['teacher']):.2f} times as fast",
    )  # fmt: skip
    search = Table(
        ("arm", *(f"lr {lr:g}" for lr in s.lr)),
        tuple((ARMS[arm], *(spread([x["val_micro"] for x in found[arm, lr]]) for lr in s.lr)) for arm in s.arms),
        "On validation, by learning rate",
    )
    worth = score_table(lab, of_teacher, rows)
    write_tables(lab, folder.folder, [worth, size, search], kept)
    folder.finish({
        "teacher": of_teacher, "students": rows, "parameters": sizes, "documents_per_second": rates,
        "student": kept.folder.name,
    })  # fmt: skip
    print("\n\n".join(plain_table(table) for table in (worth, size)))


def score_table(lab: TextLab, of_teacher: Found, rows: Mapping[Arm, Sequence[Found]]) -> Table:
    """Test scores of the teacher and of every arm at its learning rate."""
    s, several = lab.cfg.student, lab.corpus.multilabel
    names = {"micro": "micro-F1", "macro": "macro-F1", "map": "mAP"} if several else {"micro": "accuracy"}
    seen = min(s.documents or len(lab.parts[0]), len(lab.parts[0]))
    cells = [("teacher", f"{len(lab.parts[0]):,}", *(spread([of_teacher[f"test_{n}"]]) for n in names), "", "",
              spread([of_teacher["seconds"]], 0))]  # fmt: skip
    for arm, found in rows.items():
        values = {name: [x[f"test_{name}"] for x in found] for name in names}
        base = [x["test_micro"] for x in rows["alone"]] if arm != "alone" and "alone" in rows else None
        cells.append((
            ARMS[arm], f"{seen:,}", *(spread(own) for own in values.values()),
            gain(values["micro"], base) if base else "", f"{found[0]['lr']:g}",
            spread([x["seconds"] for x in found], 0),
        ))  # fmt: skip
    return Table(
        ("model", "documents", *(f"{name}, %" for name in names.values()), "over alone", "lr", "seconds"),
        tuple(cells),
        f"{lab.corpus.name}, {len(lab.parts[2]):,} test documents: mean and deviation over seeds {list(s.seeds)}; over "
        "alone: mean and standard error of the paired differences",
    )


def write_tables(lab: TextLab, folder: Path, tables: Sequence[Table], kept: Fit) -> None:
    """The report, with the curves of the student that is kept."""
    lines = [json.loads(line) for line in (kept.folder / "metrics.jsonl").read_text().splitlines()]
    curves = folder / "images" / "curves.png"
    names = [name for name in lines[0] if name != "step"]
    loss_curve(curves, {name: [(x["step"], x[name]) for x in lines] for name in names}, "step", "value")
    s, t = lab.cfg.student, lab.cfg.teacher
    blocks: list[Block] = [
        Paragraph(
            f"{t.layers} layers teach {s.layers}, copied from {list(s.copied_layers)}; {s.epochs} epochs of "
            f"{s.batch_size} a batch for every student. Learning rates, of a student the kept seed"
            f"{', thresholds' if lab.corpus.multilabel else ''}: chosen on validation."
        ),
        *tables, Heading(f"Training of {kept.folder.name}"), Picture(curves, "by step"),
    ]  # fmt: skip
    write_report(folder, f"{lab.corpus.name}: {t.layers} layers to {s.layers}", blocks)


def export(lab: TextLab, student: Any, folder: Path) -> None:
    """The student with its word pieces, as transformers loads them; the folder appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    student.save_pretrained(part)
    load_tokenizer(lab.scratch[lab.cfg.student.width]).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", REPOSITORY, DistillTextConfig, (), distil)


if __name__ == "__main__":
    leave(main())
