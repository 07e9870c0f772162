"""An encoder from nothing: word pieces and word vectors learned from a corpus, saved as an ordinary encoder folder."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.corpus import Corpus
from utils.encoder import PRESETS
from utils.run_folder import short_hash
from utils.streams import stream_seed

TABLE_STD = 0.15  # spread of the word table, above that of position vectors: words first
WINDOW = 5  # words to each side that count as company
log = logging.getLogger("distill_lab")


def scratch_encoder(home: Path, preset: str, corpus: Corpus, vocab_size: int, max_length: int) -> Path:
    """Folder below `home` of the encoder that a corpus' training documents and these sizes decide; built if absent."""
    key = short_hash({"texts": corpus.fingerprint, "vocab": vocab_size, "length": max_length})
    folder = home / f"{preset}_{key}"
    if not (folder / "config.json").exists():
        build_scratch_encoder(folder, preset, corpus.train.texts, vocab_size, max_length)
    return folder


def build_scratch_encoder(folder: Path, preset: str, texts: Sequence[str], vocab_size: int, max_length: int) -> None:
    """Write config, tokenizer and weights of a fresh BERT into `folder`, which appears whole or not at all."""
    from transformers import BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = train_tokenizer(texts, vocab_size)
    layers, hidden, heads = PRESETS[preset]
    settings = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(max_length, 64),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=hidden**-0.5,  # the usual 0.02 fits 768 wide layers; at 128 a student collapses
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(0, "scratch encoder"))
        body = BertModel(settings)
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        body.embeddings.word_embeddings.weight.copy_(word_vectors(ids, len(tokenizer), hidden))
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    body.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    log.info(f"built a {preset} encoder with {len(tokenizer)} word pieces in {folder}")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A WordPiece tokenizer of at most `vocab_size` pieces, trained on the texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trainer = BertWordPieceTokenizer(lowercase=True)
    # Inner letters get their ids in hash order, new in every run, and ids break ties: name the letters beforehand.
    letters = Counter(char for text in texts for word in trainer.normalize(text).split() for char in word[1:])
    inner = sorted(f"##{letter}" for letter, _ in letters.most_common(1000))  # the trainer keeps no more either
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inner]
    trainer.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=named
    )
    plain = BertWordPieceTokenizer(trainer.get_vocab(), lowercase=True)  # in which the letters are nothing special
    return BertTokenizerFast(tokenizer_object=plain._tokenizer)


def word_vectors(ids: Sequence[Sequence[int]], vocab: int, dim: int) -> torch.Tensor:
    """Vectors [vocab, dim]: SVD of the positive pointwise mutual information of words within WINDOW.

    Levy & Goldberg, "Neural word embedding as implicit matrix factorization" (2014).
    """
    import numpy as np
    from scipy.sparse import coo_matrix, diags
    from sklearn.utils.extmath import randomized_svd

    # Documents end to end, WINDOW fillers (id = vocab) between them: no pair crosses a border.
    filler = [vocab] * WINDOW
    flat = np.array([token for document in ids for token in (*document, *filler)], dtype=np.int64)
    counts = coo_matrix((vocab + 1, vocab + 1))
    for distance in range(1, WINDOW + 1):
        pairs = (flat[:-distance], flat[distance:])
        counts = counts + coo_matrix((np.ones(len(pairs[0])), pairs), shape=counts.shape)
    counts = (counts + counts.T).tocsr()[:vocab, :vocab]
    total = counts.sum()
    inverse = 1.0 / np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
    pmi = (diags(inverse) @ counts @ diags(inverse) * total).tocsr()  # p(a,b) / p(a) p(b)
    pmi.data = np.maximum(np.log(pmi.data), 0.0)
    pmi.eliminate_zeros()
    left, strength, _ = randomized_svd(pmi, n_components=min(dim, vocab - 1), random_state=0)
    table = np.zeros((vocab, dim))
    table[:, : left.shape[1]] = left * np.sqrt(strength)
    vectors = torch.from_numpy(table).float()
    unseen = vectors.norm(dim=1) == 0
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(stream_seed(0, "unseen words")))
    vectors = vectors / vectors.std().clamp_min(1e-8) * TABLE_STD
    vectors[unseen] = noise[unseen] * TABLE_STD
    return vectors
