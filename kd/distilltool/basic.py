"""Training without a teacher, and the plain distillation of logits."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from config import ConfigError
from kd.distilltool.adaptors import Adaptor, Place, Results
from kd.distilltool.loop import Loop
from kd.distilltool.settings import DistillationConfig, TrainingConfig
from kd.distilltool.teacher_cache import TeacherCache
from kd.distilltool.terms import Term, hard_term, output_terms


def refuse_matches(distill_config: DistillationConfig, name: str) -> None:
    """Raise ConfigError where matches are asked for that a distiller does not have."""
    if distill_config.intermediate_matches:
        raise ConfigError(f"intermediate_matches: {name} has none; use Distillation, or leave them out")


class BasicTraining(Loop):
    """Supervised training on the sum of the adaptor's 'losses': of a teacher, or of a student alone."""

    def __init__(self, train_config: TrainingConfig, model: nn.Module, adaptor: Adaptor) -> None:
        super().__init__(train_config, model, {})
        self.model, self.adaptor = model, adaptor

    def terms(self, batch: Any, args: Mapping[str, Any]) -> list[Term]:
        """The losses. Raises ConfigError where the adaptor gives none."""
        found = self.results(self.model, self.adaptor, "adaptor", batch, args, learns=True)
        if not found.losses:
            raise ConfigError("adaptor: no key 'losses', which BasicTraining trains on: return a list of scalars")
        return [hard_term(1.0, found)]


class BasicDistillation(Loop):
    """One teacher, one student: the loss on their logits and the student's own losses."""

    takes_matches = False
    places_T: tuple[Place, ...] = ()  # features that terms compare
    places_S: tuple[Place, ...] = ()

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: nn.Module,
        model_S: nn.Module,
        adaptor_T: Adaptor,
        adaptor_S: Adaptor,
    ) -> None:
        super().__init__(train_config, model_S, {"model_T": model_T})
        DistillationConfig.require(distill_config, "distill_config")
        if not self.takes_matches:
            refuse_matches(distill_config, type(self).__name__)
        self.distill_config, self.model_T, self.model_S = distill_config, model_T, model_S
        self.adaptor_T, self.adaptor_S = adaptor_T, adaptor_S
        key = distill_config.cache_teacher
        self.cache = None if key is None else TeacherCache(key)

    def terms(self, batch: Any, args: Mapping[str, Any]) -> list[Term]:
        """Logits, losses, matches."""
        index: list[int] = []
        if self.cache:
            batch, index = self.cache.split(batch)
        teacher = self.teacher_results(batch, index, args)
        student = self.results(self.model_S, self.adaptor_S, "adaptor_S", batch, args, self.places_S, learns=True)
        terms = [*output_terms(self.distill_config, student, teacher), *self.match_terms(student, teacher)]
        if self.distill_config.hard_label_weight and not student.losses and not self.notes:
            self.notes.append("hard_label_weight has no effect: adaptor_S gives no 'losses'")
        return terms

    def teacher_results(self, batch: Any, index: list[int], args: Mapping[str, Any]) -> Results:
        """What the teacher says, without gradients."""

        def compute() -> Results:
            return self.results(self.model_T, self.adaptor_T, "adaptor_T", batch, args, self.places_T)

        return self.cache.results("", index, self.device, compute) if self.cache else compute()

    def match_terms(self, student: Results, teacher: Results) -> list[Term]:
        """Terms on features: none here."""
        return []
