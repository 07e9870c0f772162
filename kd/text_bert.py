"""The models of `distill_text.py`: a BERT classifier with drawn weights, and how it is called."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd.text_config import Model
from utils.corpus import Corpus
from utils.encoder import TextInput, load_pretrained
from utils.streams import stream_seed


def fresh_bert(settings: Model, folder: Path, corpus: Corpus, seed: int) -> Any:
    """A BertForSequenceClassification for a corpus' classes, with sizes and word vectors of a scratch encoder."""
    from transformers import AutoModel, BertConfig, BertForSequenceClassification

    sizes = BertConfig.from_pretrained(
        folder, num_hidden_layers=settings.layers, hidden_dropout_prob=settings.dropout,
        id2label=dict(enumerate(corpus.classes)), label2id={name: i for i, name in enumerate(corpus.classes)},
        problem_type=f"{'multi' if corpus.multilabel else 'single'}_label_classification",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "text model", settings.layers))
        model = BertForSequenceClassification(sizes)
        table = load_pretrained(AutoModel, folder).get_input_embeddings().weight
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
    return model


class Called(nn.Module):
    """A classifier of transformers as a function of TextInput."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: TextInput) -> Any:
        """Its outputs."""
        return self.model(x.tokens, attention_mask=x.mask)
