"""Encoders: the two ways in are one, padding says nothing, the word table stays."""

from pathlib import Path

import pytest
import torch

from config import ConfigError
from utils.encoder import EncoderFactory, NetworkConfig, TextInput, encoder_factory, load_tokenizer
from utils.scratch_encoder import build_scratch_encoder

NETWORK = NetworkConfig(model_path="scratch:tiny", depth=2, layer_index=(1, 2), max_length=16, pooling="cls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "tiny"
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]
    texts = [" ".join(words[(i + j) % 11] for j in range(6)) for i in range(60)]
    build_scratch_encoder(path, "tiny", texts, 300, 16)
    return path


@pytest.fixture(scope="module")
def factory(folder: Path) -> EncoderFactory:
    return encoder_factory(NETWORK, folder, 3)


def test_embeddings_and_token_ids_are_one_way_in(factory: EncoderFactory) -> None:
    net = factory.fresh(0, "net").eval()
    ids, mask = torch.randint(5, 60, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    by_ids, by_rows = net(TextInput(ids, mask)), net(TextInput(net.word_table[ids], mask))
    torch.testing.assert_close(by_ids.logits, by_rows.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_ids.features, by_rows.features, rtol=0, atol=1e-5)


def test_padding_does_not_change_a_row(factory: EncoderFactory) -> None:
    net = factory.fresh(0, "net").eval()
    ids = torch.randint(5, 60, (2, 6))
    short = net(TextInput(ids, torch.ones(2, 6, dtype=torch.long)))
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 5)], 1).long()
    padded = net(TextInput(torch.cat([ids, torch.randint(5, 60, (2, 5))], 1), mask))
    torch.testing.assert_close(short.features, padded.features, rtol=0, atol=1e-5)


def test_features_are_the_first_rows_of_transformers_hidden_states(factory: EncoderFactory) -> None:
    net = factory.fresh(0, "net").eval()
    ids, mask = torch.randint(5, 60, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    states = net.body(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(net(TextInput(ids, mask)).features, torch.stack([states[1][:, 0], states[2][:, 0]]))
    torch.testing.assert_close(net.get_feature_single(ids, mask), states[2][:, 0])
    torch.testing.assert_close(
        net.get_feature_single(embedding=net.word_table[ids]), states[2][:, 0], rtol=0, atol=1e-5
    )


def test_fresh_encoders_share_the_frozen_words_and_nothing_else(factory: EncoderFactory) -> None:
    one, same, other = (factory.fresh(0, "net", i) for i in (1, 1, 2))
    assert torch.equal(one.word_table, other.word_table)
    assert not one.word_table.requires_grad
    name = "body.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_word_vectors_put_neighbours_together(folder: Path, factory: EncoderFactory) -> None:
    tokenizer, table = load_tokenizer(folder), factory.word_table
    a, b, far = (table[tokenizer.convert_tokens_to_ids(w)] for w in ("alpha", "beta", "[PAD]"))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(a, b, dim=0) > cosine(a, far, dim=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"net_type": "ROBERTA"}, "net_type"), ({"max_length": 600}, "positions")],
)
def test_a_config_that_does_not_fit_the_encoder_is_refused(
    folder: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_factory(NETWORK.model_copy(update=change), folder, 3)
