"""The last block of an encoder of which only the [CLS] row is read: keys and values of all rows, one query."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class FirstRow(nn.Module):
    """A BERT block, under its own parameters' names, that computes its first row alone: [B, S, D] -> [B, 1, D]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = (
            block.get_submodule(name) for name in ("attention", "intermediate", "output")
        )

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
        """The block's first row; `attention_mask` broadcasts to [B, heads, S, S], the rest is not used."""
        own: Any = self.attention.get_submodule("self")
        query, key, value = (
            part.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
            for part in (own.query(hidden[:, :1]), own.key(hidden), own.value(hidden))
        )
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        dropout = own.dropout.p if self.training else 0.0
        row = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=own.scaling)
        row = self.attention.get_submodule("output")(row.transpose(1, 2).flatten(2), hidden[:, :1])
        return self.output(self.intermediate(row), row)


def reads_alike(block: nn.Module) -> bool:
    """Whether a block is built as BERT's is (RoBERTa's and ELECTRA's are too), without cross-attention."""
    wanted = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.self.dropout",
              "attention.output", "intermediate", "output")  # fmt: skip
    names = {name for name, _ in block.named_modules()}
    return names.issuperset(wanted) and not getattr(block, "is_decoder", False)
