"""Models of transformers: an adaptor for their outputs, and attentions that can be compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from config import ConfigError
from kd.distilltool.loop import unwrapped
from utils.losses import widened

TINY = 1e-12  # least probability whose logarithm is taken
HEADS = ("num_attention_heads", "num_heads", "n_heads")  # an attention module has one of these
DROPOUTS = ("dropout", "attention_dropout", "attn_dropout")  # its dropout of probabilities
ADVICE = "call expose_attentions(model) before, and pass output_attentions=True"


class OnDemand(Sequence[Tensor]):
    """Tensors, each changed when it is asked for."""

    def __init__(self, items: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> None:
        self.items, self.change = items, change

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: Any) -> Any:
        return self.change(self.items[number])


class HuggingFaceAdaptor:
    """adaptor(batch, outputs) for outputs with names: loss, logits or start_ and end_logits, hidden_states, attentions.

    attention: "log" gives log-probabilities, of which the softmax in attention_ce is the probability; "probabilities"
    are for attention_mse. Logits [B, L, C] are compared where labels are not -100, without labels where the inputs mask
    is not 0; start and end logits [B, L] lose their padding.
    """

    def __init__(
        self, attention: Literal["log", "probabilities"] | None = None, mask: str | int = "attention_mask",
        labels: str | int = "labels",
    ) -> None:  # fmt: skip
        """`mask`, `labels`: their keys in a batch, or places in a tuple."""
        self.attention, self.mask, self.labels = attention, mask, labels
        self.checked = set[bool]()

    def __call__(self, batch: Any, outputs: Any) -> dict[str, Any]:
        """Raises ConfigError where attentions are wanted and absent, or not probabilities."""
        mask, labels = entry(batch, self.mask), entry(batch, self.labels)
        results: dict[str, Any] = {} if mask is None else {"inputs_mask": mask}
        if (loss := getattr(outputs, "loss", None)) is not None:
            results["losses"] = [loss]
        if (logits := getattr(outputs, "logits", None)) is not None:
            results["logits"] = logits
            kept = labels != -100 if labels is not None and labels.dim() == 2 else mask
            if logits.dim() == 3 and kept is not None:
                results["logits_mask"] = kept
        elif (start := getattr(outputs, "start_logits", None)) is not None:
            least = torch.finfo(start.dtype).min
            results["logits"] = [
                x if mask is None else x.masked_fill(mask == 0, least) for x in (start, outputs.end_logits)
            ]
        if (hidden := getattr(outputs, "hidden_states", None)) is not None:
            results["hidden"] = list(hidden)
        if self.attention:
            found = [x for x in getattr(outputs, "attentions", None) or () if x is not None]
            if not found:
                raise ConfigError(f"attentions: the model gives none, as with attn_implementation='sdpa': {ADVICE}")
            if (learns := found[0].requires_grad) not in self.checked:  # one adaptor may serve teacher and student
                require_probabilities(found[0], mask)
                self.checked.add(learns)
            log = self.attention == "log"
            results["attention"] = OnDemand(found, lambda p: widened(p).clamp_min(TINY).log()) if log else found
        return results


def entry(batch: Any, key: str | int) -> Tensor | None:
    """A batch's entry by key or by place; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get(key)
    return batch[key] if isinstance(key, int) and key < len(batch) else None


def require_probabilities(attention: Tensor, mask: Tensor | None) -> None:
    """Raise ConfigError unless rows of attention [B, H, L, L] sum to 1 where queries are kept; dropout breaks that."""
    sums = attention.detach().float().sum(-1)
    if mask is not None:
        sums = sums.masked_fill((mask == 0)[:, None, :], 1.0)
    worst = float((sums - 1).abs().max())
    if worst > 0.02:  # 16-bit probabilities of a long row
        raise ConfigError(f"attentions: rows sum to 1 only within {worst:.2g}, as after dropout: {ADVICE}")


def expose_attentions(model: nn.Module) -> list[str]:
    """Let a model of transformers return its attentions as probabilities: eager, and no dropout on them.

    Returns the names of the dropouts that were set to 0. Raises ConfigError where the model cannot.
    """
    net: Any = unwrapped(model)
    if not hasattr(net, "set_attn_implementation"):
        raise ConfigError(f"{type(net).__name__}: not a model of transformers with set_attn_implementation")
    try:
        net.set_attn_implementation("eager")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{type(net).__name__}: has no eager attention: {error}") from error
    changed = []
    for name, module in net.named_modules():
        if not any(hasattr(module, key) for key in HEADS):
            continue
        for key in DROPOUTS:  # a number in some families, a module in others
            part = getattr(module, key, None)
            if isinstance(part, nn.Dropout) and part.p:
                part.p = 0.0
            elif isinstance(part, float) and part:
                setattr(module, key, 0.0)
            else:
                continue
            changed.append(f"{name}.{key}")
    return changed
