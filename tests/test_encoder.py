"""Encoders: the two ways in are one, padding says nothing, the word table stays."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from config import ConfigError
from utils.encoder import EncoderFactory, NetworkConfig, Pooling, TextInput, encoder_factory, load_tokenizer
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


@pytest.mark.parametrize("pooling", ["cls", "pooler"])
def test_features_are_the_first_rows_of_transformers_hidden_states(folder: Path, pooling: Pooling) -> None:
    factory = encoder_factory(NETWORK.model_copy(update={"pooling": pooling}), folder, 3)
    net = factory.fresh(0, "net").eval()
    ids, mask = torch.randint(5, 60, (4, 9)), (torch.arange(9) < torch.tensor([[9], [3], [7], [1]])).long()
    with torch.random.fork_rng():  # transformers' own model, with the same weights
        body = AutoModel.from_config(factory.template.config)
    body.load_state_dict(net.body.state_dict(), strict=False)  # a pooler that is not used is absent
    out = body.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(
        net(TextInput(ids, mask)).features, torch.stack([state[:, 0] for state in out.hidden_states[1:]])
    )
    pooled = out.pooler_output if pooling == "pooler" else out.last_hidden_state[:, 0]
    torch.testing.assert_close(net.get_feature_single(ids, mask), pooled)
    rows = net.word_table[ids]
    torch.testing.assert_close(net.get_feature_single(None, mask, rows), pooled, rtol=0, atol=1e-5)


def test_the_last_row_alone_has_the_gradient_of_the_whole_block(folder: Path) -> None:
    factory = encoder_factory(NETWORK, folder, 3)
    net = factory.fresh(0, "net").double().eval()
    whole, blocks = copy.deepcopy(net), copy.deepcopy(factory.template).get_submodule("encoder.layer").double()
    whole.blocks()[-1] = blocks.get_submodule("1")
    whole.load_state_dict(net.state_dict())
    rows = torch.randn(4, 9, 128, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([[9], [3], [7], [1]])).long()
    grads = []
    for encoder in (net, whole):
        x = rows.clone().requires_grad_()
        encoder(TextInput(x, mask)).logits.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [({"depth": 3}, "depth"), ({"layer_index": (3,)}, "layer_index"), ({"model_path": "scratch:huge"}, "scratch:base")],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**{**NETWORK.model_dump(), **change})


def test_an_encoder_of_another_depth_or_no_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    deeper = NetworkConfig(model_path=str(folder), depth=3, max_length=16)
    with pytest.raises(ConfigError, match=r"depth: 3, but .* has 2 layers"):
        encoder_factory(deeper, folder, 3)
    with pytest.raises(ConfigError, match="no folder"):
        encoder_factory(deeper, tmp_path / "absent", 3)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder_factory(deeper, tmp_path, 3)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_logits_ignore_what_stands_on_padding(pooling: Pooling, folder: Path) -> None:
    network = NetworkConfig(model_path="scratch:tiny", depth=2, max_length=16, pooling=pooling)
    net = encoder_factory(network, folder, 3).fresh(0, "net").eval()
    rows = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[6], [4]])).long()
    whole = net(TextInput(torch.where(mask[..., None] > 0, rows, 7.0), mask))
    short = net(TextInput(rows[1:, :4], mask[1:, :4]))
    torch.testing.assert_close(net(TextInput(rows, mask)).logits, whole.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(short.features, whole.features[:, 1:], rtol=0, atol=1e-5)


def test_drawing_an_encoder_leaves_the_global_random_state_alone(factory: EncoderFactory) -> None:
    before = torch.random.get_rng_state()
    one, same = (factory.fresh(0, "net", 1).state_dict() for _ in range(2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_scratch_encoder_is_the_same_whenever_it_is_built(tmp_path: Path) -> None:
    texts = ["one two three", "two three four", "one four two"] * 3  # pieces of equal counts: nothing may hang on ties
    built = []
    for i in range(3):
        build_scratch_encoder(tmp_path / str(i), "tiny", texts, 200, 16)
        built.append({path.name: path.read_bytes() for path in (tmp_path / str(i)).iterdir()})
    assert built[0] == built[1] == built[2]


def test_word_pieces_are_those_of_the_texts_and_nothing_in_a_text_is_special(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) <= 300
    assert tokenizer.tokenize("Alpha beta alphabeta") == ["alpha", "beta", *tokenizer.tokenize("alphabeta")]
    assert "".join(piece.removeprefix("##") for piece in tokenizer.tokenize("alphabeta")) == "alphabeta"
    ids = tokenizer("alpha ##a")["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
    assert "##a" not in tokenizer.convert_ids_to_tokens(ids)
