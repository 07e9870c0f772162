"""Several teachers of one task and one student."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from config import ConfigError
from kd.distilltool.adaptors import Adaptor, Results
from kd.distilltool.basic import BasicDistillation
from kd.distilltool.settings import DistillationConfig, TrainingConfig
from kd.distilltool.terms import shapes


class BasicMultiTeacherDistillation(BasicDistillation):
    """The student learns the mean of the teachers' logits; no matches."""

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Sequence[nn.Module],
        model_S: nn.Module,
        adaptor_T: Adaptor | Sequence[Adaptor],
        adaptor_S: Adaptor,
    ) -> None:
        """`adaptor_T`: one for all teachers or one each. Raises ConfigError."""
        models = list(model_T) if isinstance(model_T, Sequence | nn.ModuleList) else []
        adaptors = list(adaptor_T) if isinstance(adaptor_T, Sequence) else [adaptor_T] * len(models)
        if not models or len(adaptors) != len(models):
            raise ConfigError(
                f"model_T: {len(models) or 'no'} teachers in a list, adaptor_T: {len(adaptors)}; give a list of "
                "teachers and one adaptor, or one each"
            )
        super().__init__(train_config, distill_config, models[0], model_S, adaptors[0], adaptor_S)
        self.models_T, self.adaptors_T = models, adaptors
        self.teachers = {f"model_T[{i}]": model for i, model in enumerate(models)}

    def teacher_results(self, batch: Any, index: list[int], args: Mapping[str, Any]) -> Results:
        """Mean logits. Raises ConfigError where the teachers' differ in shape."""

        def compute() -> Results:
            found = [
                self.results(model, adaptor, f"adaptor_T[{i}]", batch, args)
                for i, (model, adaptor) in enumerate(zip(self.models_T, self.adaptors_T, strict=True))
            ]
            for i, one in enumerate(found):
                if [x.shape for x in one.logits] != [x.shape for x in found[0].logits]:
                    raise ConfigError(
                        f"'logits' of model_T[{i}] are {shapes(one.logits) or 'none'}, of model_T[0] "
                        f"{shapes(found[0].logits) or 'none'}: teachers must have one task"
                    )
            means = tuple(torch.stack(each).mean(0) for each in zip(*(one.logits for one in found), strict=True))
            return Results(means, next((one.logits_mask for one in found if one.logits_mask), ()))

        return self.cache.results("", index, self.device, compute) if self.cache else compute()
