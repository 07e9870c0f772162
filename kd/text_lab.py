"""What `distill_text.py` trains and scores: documents, BERTs from nothing, a teacher that is kept, students by arm."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from config import ConfigError, nested
from kd.distilltool import (
    BasicTraining,
    Distillation,
    HuggingFaceAdaptor,
    TrainingConfig,
    expose_attentions,
    init_student_from_layers,
)
from kd.methods.fidelity import Said, fidelity
from kd.text_bert import Called, fresh_bert
from kd.text_config import Arm, DistillTextConfig, Model, teacher_folder
from utils.checkpoint import atomic_write, load_tensors, save_tensors
from utils.corpus import Corpus
from utils.ddp import World
from utils.encoder import load_tokenizer
from utils.fit import predict, rate
from utils.metrics import best_threshold, probabilities, score
from utils.run_folder import RESULT, RunFolder, log
from utils.sampling import buckets
from utils.scratch_encoder import scratch_encoder
from utils.stopping import StopFlag
from utils.streams import generator, stream_seed
from utils.utils_text import TextSet, get_loader, load_corpus

TOKENS = 16384  # of a forward pass that scores
SAVES = 5  # of a training, to resume from
Found = dict[str, float]


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


def decisions(said: Said) -> Said:
    """Every (document, label) as a sample of two classes: logits [N, L] of labels as (0, z) [N * L, 2]; rows as is.

    Their softmax is (1 - sigmoid(z), sigmoid(z)), so that agreement is of decisions at a threshold of 0.5.
    """
    return Said(torch.stack([torch.zeros_like(said.logits), said.logits], -1).flatten(0, 1), said.rows)


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
        """A BertForSequenceClassification with drawn weights, on this rank's device."""
        return fresh_bert(settings, self.scratch[settings.width], self.corpus, seed).to(self.world.device)

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

    def said(self, model: Any, part: TextSet) -> Said:
        """Logits [N, C] of documents, and pooled rows [N, D] in an order that is the same for every model."""
        rows: list[Tensor] = []
        hook = model.classifier.register_forward_pre_hook(lambda _, given: rows.append(given[0].float().cpu()))
        places = buckets(part.lengths.tolist(), TOKENS)
        logits = predict(Called(model), lambda ids: part.input(ids, self.world.device), places, len(part))
        hook.remove()
        return Said(logits, torch.cat(rows))

    def scores(self, model: nn.Module, of_teacher: Said | None) -> Found:
        """Of validation and test, in percent, with fidelity to what a teacher says of the test documents.

        The threshold of several labels is chosen on validation.
        """
        several = self.corpus.multilabel
        said = [self.said(model, part) for part in self.parts[1:]]
        probs = [probabilities(own.logits, several) for own in said]
        threshold = best_threshold(probs[0], self.parts[1].targets) if several else 0.5
        found = {"threshold": threshold}
        for name, p, part in zip(("val", "test"), probs, self.parts[1:], strict=True):
            scores = score(p, part.targets, several, threshold).as_dict()
            found |= {f"{name}_{key}": value for key, value in scores.items()}
        if of_teacher:
            y = self.parts[2].targets
            if several:
                found |= fidelity(decisions(said[1]), decisions(of_teacher), (y > 0.5).long().flatten()).pair
            else:
                found |= fidelity(said[1], of_teacher, y.argmax(1)).pair
        return found

    def result(
        self, fit: Fit, settings: Model, teacher: nn.Module | None = None, of_teacher: Said | None = None
    ) -> Found:
        """Scores of a training, which is run unless it is finished; `of_teacher`: of the test documents."""
        path = fit.folder / RESULT
        if not path.exists():
            self.flag.check()
            log.info(f"{fit.folder.name}: {settings.layers} layers, learning rate {fit.lr:g}")
            began = time.monotonic()
            model = self.train(fit, settings, teacher)
            found = {"lr": fit.lr, "seconds": time.monotonic() - began} | self.scores(model, of_teacher)
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
            home = RunFolder(folder, nested(cfg), world, wait=self.flag)
            if not home.said_finished():
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
    home = cfg.pretrained_dir / cfg.dataset.dataset / "encoders"
    scratch: dict[str, Path] = {
        width: scratch_encoder(home, width, corpus, cfg.vocab_size, cfg.max_length)
        for width in {cfg.teacher.width, cfg.student.width}
    }
    train, val, test = get_loader(corpus, load_tokenizer(scratch[cfg.student.width]), cfg.max_length)
    if cfg.dataset.load_memory:
        train, val, test = (part.to(world.device) for part in (train, val, test))
    return TextLab(cfg, world, flag, corpus, (train, val, test), scratch)
