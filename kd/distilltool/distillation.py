"""One teacher, one student, and every kind of term."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from config import ConfigError
from kd.distilltool.adaptors import Adaptor, Results
from kd.distilltool.basic import BasicDistillation
from kd.distilltool.matches import MATCH_LOSS_MAP
from kd.distilltool.projections import build_projection
from kd.distilltool.settings import DistillationConfig, Layer, TrainingConfig
from kd.distilltool.taps import CustomMatch, custom_match, taps, tensor_of
from kd.distilltool.terms import Term, shapes
from utils.losses import widened


class Distillation(BasicDistillation):
    """Logits, losses and matches of features that adaptors give (intermediate_matches) or modules do (custom_matches).

    custom_matches: dicts of module_T, module_S (name or module, two for gram and mmd), loss (name or f(state_S,
    state_T, mask=None)), weight, and optionally proj (as in intermediate_matches, or a module) and select (output ->
    tensor).
    """

    takes_matches = True

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: nn.Module,
        model_S: nn.Module,
        adaptor_T: Adaptor,
        adaptor_S: Adaptor,
        custom_matches: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Raises ConfigError."""
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        self.matches = [match for match in distill_config.intermediate_matches or () if match.weight]
        self.custom = [custom_match(given, model_T, model_S) for given in custom_matches or ()]
        if self.custom and self.cache:
            raise ConfigError("cache_teacher: custom_matches need the teacher in every step; set it to None")
        self.places_T = tuple((m.feature, i) for m in self.matches for i in layers(m.layer_T))
        self.places_S = tuple((m.feature, i) for m in self.matches for i in layers(m.layer_S))
        self.projections = [
            self.projection(p) for p in (*(m.proj for m in self.matches), *(c.proj for c in self.custom))
        ]
        self.caught_T: dict[nn.Module, Any] = {}
        self.caught_S: dict[nn.Module, Any] = {}

    def projection(self, given: nn.Module | tuple[Any, ...] | None) -> nn.Module | None:
        """A match's projection, which is trained with the student."""
        if given is None:
            return None
        module = (
            given if isinstance(given, nn.Module) else build_projection(given[0], given[1], given[2], len(self.extra))
        )
        if any(True for _ in module.parameters()):
            self.extra.append((module, given[3] if isinstance(given, tuple) else None))
        return module

    def outputs(self, model: nn.Module, batch: Any, args: Mapping[str, Any], learns: bool) -> Any:
        """A model's outputs; those of its tapped modules are kept for the terms of this batch."""
        modules = [module for match in self.custom for module in (match.modules_S if learns else match.modules_T)]
        with taps(modules) as caught:
            found = super().outputs(model, batch, args, learns)
        if learns:
            self.caught_S = caught
        else:
            self.caught_T = caught
        return found

    def match_terms(self, student: Results, teacher: Results) -> list[Term]:
        """One term for each match."""
        mask, other = student.inputs_mask, teacher.inputs_mask
        if mask is not None and other is not None and mask.shape != other.shape:
            raise ConfigError(
                f"'inputs_mask': student {list(mask.shape)}, teacher {list(other.shape)}: features are compared "
                "position by position"
            )
        mask = other if mask is None else mask
        terms, projections = [], iter(self.projections)
        for match in self.matches:
            states = [student.features[match.feature, i] for i in layers(match.layer_S)]
            targets = [teacher.features[match.feature, i] for i in layers(match.layer_T)]
            terms.append(self.term(match.name, match.weight, MATCH_LOSS_MAP[match.loss], states, targets, mask,
                                   next(projections)))  # fmt: skip
        for custom in self.custom:
            states, targets = caught(custom, self.caught_S, "module_S"), caught(custom, self.caught_T, "module_T")
            fits = custom.own or all(x.dim() > 2 for x in states)
            terms.append(self.term(custom.name, custom.weight, custom.loss, states, targets, mask if fits else None,
                                   next(projections)))  # fmt: skip
        self.caught_S, self.caught_T = {}, {}
        return terms

    def term(
        self, name: str, weight: float, loss: Any, states: list[Tensor], targets: list[Tensor], mask: Tensor | None,
        projection: nn.Module | None,
    ) -> Term:  # fmt: skip
        """weight * loss(projected states, targets), in float32 at least. Raises ConfigError where shapes do not fit."""
        said = shapes(states)
        if projection is not None:
            width = getattr(projection, "in_features", states[0].shape[-1])
            if width != states[0].shape[-1]:
                raise ConfigError(f"{name}: proj takes width {width}, but the student's feature is {said}")
            kind = next((p.dtype for p in projection.parameters()), states[0].dtype)
            states = [projection(widened(state).to(kind)) for state in states]
            said += f" to {states[0].shape[-1]}"
        try:
            one = len(states) == 1
            value = loss(states[0], targets[0], mask=mask) if one else loss(states, targets, mask=mask)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if value.dim():
            raise ConfigError(f"{name}: the loss gives {list(value.shape)}, not a scalar")
        return Term(name, weight, value, said, shapes(targets))


def layers(layer: Layer) -> tuple[int, ...]:
    """One or two entries of a feature's list."""
    return (layer,) if isinstance(layer, int) else layer


def caught(match: CustomMatch, outputs: Mapping[nn.Module, Any], key: str) -> list[Tensor]:
    """The features of a match's modules. Raises ConfigError where one was not called."""
    modules = match.modules_S if key == "module_S" else match.modules_T
    if any(module not in outputs for module in modules):
        raise ConfigError(f"custom_matches: {match.name}: {key} is not called in the model's forward")
    return [tensor_of(match, outputs[module], key) for module in modules]
