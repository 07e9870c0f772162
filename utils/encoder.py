"""Text encoders: any BERT-like checkpoint of transformers, or one built from scratch, behind one calling contract."""

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from config import ConfigError, ModelPath, Section
from utils.contract import Output
from utils.first_row import FirstRow, reads_alike
from utils.streams import stream_seed

Pooling = Literal["pooler", "cls", "mean"]
SCRATCH = "scratch:"
# layers, hidden size, attention heads; the feed-forward part is 4 x hidden. Sizes of the public miniature BERTs.
PRESETS = {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "base": (12, 768, 12)}
log = logging.getLogger("distill_lab")


class NetworkConfig(Section):
    """The encoder of teachers and students."""

    model_path: ModelPath  # a local folder, a hub name, or scratch:{tiny,mini,small,base}
    net_type: str = "BERT"
    norm_type: Literal["layernorm"] = "layernorm"
    depth: int = Field(ge=1)
    layer_index: tuple[int, ...] = ()  # layers whose rows are matched, 1 = first block; empty = the pooled output
    max_length: int = Field(ge=4)
    pooling: Pooling = "pooler"
    vocab_size: int = Field(8000, ge=200)  # of a scratch encoder's word pieces

    @model_validator(mode="after")
    def check(self) -> "NetworkConfig":
        """Layers exist; a preset exists and has the stated depth."""
        wrong = [i for i in self.layer_index if not 1 <= i <= self.depth]
        if wrong:
            raise ValueError(
                f"layer_index: {wrong[0]} is not a layer, depth: {self.depth} has layers 1 to {self.depth}"
            )
        if self.scratch:
            if self.preset not in PRESETS:
                raise ValueError(
                    f"model_path: {self.model_path!r} is not one of {', '.join(SCRATCH + p for p in PRESETS)}"
                )
            if PRESETS[self.preset][0] != self.depth:
                raise ValueError(f"depth: {self.depth}, but {self.model_path} has {PRESETS[self.preset][0]} layers")
        return self

    @property
    def scratch(self) -> bool:
        """Whether the encoder is built here instead of loaded."""
        return self.model_path.startswith(SCRATCH)

    @property
    def preset(self) -> str:
        """Name behind `scratch:`."""
        return self.model_path.removeprefix(SCRATCH)

    @property
    def assumed_hidden(self) -> int:
        """Hidden size for an estimate without weights: the preset's, a base model's for 6 layers and more, or 512."""
        if self.scratch:
            return PRESETS[self.preset][1]
        return 768 if self.depth >= 6 else 512


class TextInput(NamedTuple):
    """What an encoder reads: token ids [B, S] (integer) or word embeddings [B, S, D] (float), and their mask [B, S]."""

    tokens: Tensor
    mask: Tensor


class TextEncoder(nn.Module):
    """A transformers body under a linear head; `logits, features = net(TextInput)`.

    Embeddings replace only the word lookup: position and type vectors and the first LayerNorm are still added.
    """

    def __init__(self, body: nn.Module, nclass: int, pooling: Pooling, layers: tuple[int, ...]) -> None:
        super().__init__()
        settings: Any = body.config
        self.body, self.pooling, self.layers = body, pooling, layers
        if pooling != "pooler" and getattr(body, "pooler", None) is not None:
            self.body.pooler = None  # type: ignore[assignment]
        self.head = nn.Linear(settings.hidden_size, nclass)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        # The synthetic set lives in this table's space: it stays what it is, in teachers and students alike.
        self.word_table.requires_grad_(False)
        blocks = self.blocks()
        if pooling != "mean" and settings._attn_implementation in ("sdpa", "eager") and reads_alike(blocks[-1]):
            blocks[-1] = FirstRow(blocks[-1])

    @property
    def word_table(self) -> Tensor:
        """Word embeddings [V, D], frozen."""
        body: Any = self.body
        return body.get_input_embeddings().weight

    def blocks(self) -> nn.ModuleList:
        """The transformer layers of the body, whatever the family calls them."""
        depth = self.body.config.num_hidden_layers  # type: ignore[union-attr]
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ConfigError(f"{type(self.body).__name__}: no list of {depth} layers found; use a BERT-like encoder")

    def forward(self, x: TextInput) -> Output:
        """Logits [B, C] and features [L, B, D]: one pooled row of every wanted layer, or of the output if none is."""
        rows: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            rows.append(self.pool_rows(output[0] if isinstance(output, tuple) else output, x.mask))

        blocks = self.blocks()
        hooks = [blocks[i - 1].register_forward_hook(keep) for i in self.layers]
        name = "inputs_embeds" if x.tokens.is_floating_point() else "input_ids"
        try:
            out = self.body(**{name: x.tokens, "attention_mask": x.mask})
        finally:
            for hook in hooks:
                hook.remove()
        pooled = out.pooler_output if self.pooling == "pooler" else self.pool_rows(out.last_hidden_state, x.mask)
        return Output(self.head(pooled), torch.stack(rows) if rows else pooled[None])

    def pool_rows(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, S, D] -> [B, D]: the first row, or the mean of the unmasked ones."""
        if self.pooling != "mean":
            return hidden[:, 0]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def get_feature_single(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """The pooled output [B, D] of token ids [B, S] or embeddings [B, S, D]; no mask means all ones."""
        tokens = input_ids if embedding is None else embedding
        if tokens is None:
            raise ValueError("get_feature_single: give input_ids [B, S] or embedding [B, S, D]")
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        out = self.body(
            **{"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens},
            attention_mask=mask if attention_mask is None else attention_mask,
        )
        if self.pooling == "pooler":
            return out.pooler_output
        return self.pool_rows(out.last_hidden_state, mask if attention_mask is None else attention_mask)


@dataclass(frozen=True)
class EncoderFactory:
    """Makes fresh encoders of one kind: the same body (or a newly drawn one, from scratch) under a new head."""

    template: nn.Module
    scratch: bool
    nclass: int
    pooling: Pooling
    layers: tuple[int, ...]

    def fresh(self, seed: int, purpose: str, *ids: int) -> TextEncoder:
        """An encoder whose new weights come from the stream (seed, purpose, ids...)."""
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, purpose, *ids))
            if self.scratch:
                from transformers import AutoModel

                body = AutoModel.from_config(self.template.config, attn_implementation="sdpa")
                body.get_input_embeddings().load_state_dict(self.template.get_input_embeddings().state_dict())  # type: ignore[operator]
            else:
                body = copy.deepcopy(self.template)
            return TextEncoder(body, self.nclass, self.pooling, self.layers)

    @property
    def word_table(self) -> Tensor:
        """Word embeddings [V, D] that all encoders of this factory share."""
        return self.template.get_input_embeddings().weight.detach()  # type: ignore[operator]


def encoder_factory(network: NetworkConfig, folder: Path | str, nclass: int) -> EncoderFactory:
    """Load the encoder in `folder` (or of that hub name) and check it against the config. Raises ConfigError."""
    from transformers import AutoModel

    template = load_pretrained(AutoModel, folder)
    settings = template.config
    if settings.model_type.lower() != network.net_type.lower():
        raise ConfigError(f"network.net_type: {network.net_type}, but {folder} holds a {settings.model_type} encoder")
    if settings.num_hidden_layers != network.depth:
        raise ConfigError(f"network.depth: {network.depth}, but {folder} has {settings.num_hidden_layers} layers")
    longest = getattr(settings, "max_position_embeddings", network.max_length)
    if network.max_length > longest:
        raise ConfigError(f"network.max_length: {network.max_length}, but {folder} has {longest} positions: lower it")
    if network.pooling == "pooler" and getattr(template, "pooler", None) is None:
        raise ConfigError(f"network.pooling: pooler, but {folder} has no pooler: set cls or mean")
    if not any(isinstance(module, nn.LayerNorm) for module in template.modules()):
        raise ConfigError(f"network.norm_type: {network.norm_type}, but {folder} has no LayerNorm")
    return EncoderFactory(template, network.scratch, nclass, network.pooling, network.layer_index)


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a local folder or hub name. Raises ConfigError."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, folder)


def load_pretrained(kind: Any, folder: Path | str) -> Any:
    """`kind.from_pretrained`, offline for a local folder, with one clear line when it cannot be had."""
    path = Path(folder)
    local = path.is_absolute()
    if local and not path.is_dir():
        raise ConfigError(
            f"network.model_path: no folder {path}: put an encoder there (config.json, model.safetensors, vocab.txt "
            "or tokenizer.json), or set network.model_path=scratch:tiny to build one"
        )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every rank would draw one
    try:
        return kind.from_pretrained(str(folder), local_files_only=local)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"network.model_path: {folder} cannot be loaded as an encoder: {reason}") from error


def missing_encoder(network: NetworkConfig) -> str | None:
    """One line naming a local encoder folder that is absent, for a dry run."""
    path = Path(network.model_path)
    if network.scratch or not path.is_absolute() or path.is_dir():
        return None
    return f"network.model_path: {path} is absent; shapes of the config are assumed"


def local_hidden_size(network: NetworkConfig) -> int:
    """Hidden size from a local config.json, else the assumed one."""
    path = Path(network.model_path) / "config.json"
    if network.scratch or not path.is_file():
        return network.assumed_hidden
    return int(json.loads(path.read_text()).get("hidden_size", network.assumed_hidden))
