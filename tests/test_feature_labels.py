"""Feature labels: the loss and its gradients, the network's own head on labels, contrast, storage."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condenser.feature_labels import (
    FeatureConfig,
    FeatureForm,
    Pool,
    Scope,
    discriminability,
    drawn_labels,
    expand,
    fair_ipc,
    feature_logits,
    feature_loss,
    feature_of,
    float_count,
    image_equivalents,
    label_shape,
    supervised_contrast,
)
from config import ConfigError
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.streams import generator

FORMS: tuple[FeatureForm, ...] = get_args(FeatureForm)
POOLS: tuple[Pool, ...] = get_args(Pool)
TAU, MAP, IMAGE = 0.07, (6, 3, 2), (3, 32, 32)


def normal(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(0, "test", number), dtype=torch.float64)


def network(**settings: Any) -> ImageNetwork:
    return image_network(ImageNetworkConfig(depth=2, width=4, **settings), 3, 8, 5, 0, "test").double()


def own_labels(net: ImageNetwork, x: Tensor, form: FeatureForm, pool: Pool = "avg") -> Tensor:
    return feature_of(net.with_map(x)[1], form, pool).detach()


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("form", FORMS)
def test_a_label_has_the_shape_of_its_form(form: FeatureForm) -> None:
    assert feature_of(normal(5, *MAP), form, "avg").shape[1:] == label_shape(MAP, form)
    assert {"map": 2048, "channel": 128, "spatial": 16}[form] == math.prod(label_shape((128, 4, 4), form))


def test_forms_are_numpy_s_reductions() -> None:
    maps = normal(5, *MAP)
    array = maps.numpy()
    assert feature_of(maps, "map", "avg") is maps
    np.testing.assert_allclose(feature_of(maps, "spatial", "avg"), array.mean(1))
    for pool, expected in zip(POOLS, (array.mean((2, 3)), array.max((2, 3)), array.sum((2, 3))), strict=True):
        np.testing.assert_allclose(feature_of(maps, "channel", pool), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pool", POOLS)
def test_the_batch_s_mean_loss_is_torch_s_mse(form: FeatureForm, pool: Pool) -> None:
    maps, labels = normal(5, *MAP), normal(5, *label_shape(MAP, form), number=1)
    loss = feature_loss(maps, labels, form, pool)
    torch.testing.assert_close(loss.mean(), F.mse_loss(feature_of(maps, form, pool), labels))
    torch.testing.assert_close(loss[2:3], feature_loss(maps[2:3], labels[2:3], form, pool))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pool", POOLS)
def test_the_loss_can_be_differentiated_twice(form: FeatureForm, pool: Pool) -> None:
    inputs = normal(2, 2, 2, 2).requires_grad_(), normal(2, *label_shape((2, 2, 2), form), number=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda maps, labels: feature_loss(maps, labels, form, pool), inputs)


def test_lambda_weighs_an_element_alike_in_every_form() -> None:
    maps = normal(4, *MAP)
    for form in FORMS:
        labels = feature_of(maps, form, "avg").clone().requires_grad_()
        loss = feature_loss(maps, labels + 0.3, form, "avg").mean()
        assert loss.item() == pytest.approx(0.09)
        (slope,) = torch.autograd.grad(loss, labels)
        torch.testing.assert_close(slope * labels.numel(), torch.full_like(slope, 0.6))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_full_loss_differs_from_that_of_ce_alone(form: FeatureForm) -> None:
    net, x, y, lbd = network(), normal(6, 3, 8, 8), torch.arange(6) % 5, 0.1
    weights, labels = tuple(net.parameters()), own_labels(net, x, form) + 1

    def gradients(output_of: str) -> Tensor:
        output, maps = net.with_map(x)
        terms = {"ce": F.cross_entropy(output.logits, y), "mse": feature_loss(maps, labels, form, "avg").mean()}
        loss = terms["ce"] + lbd * terms["mse"] if output_of == "both" else terms[output_of]
        return flat(torch.autograd.grad(loss, weights, materialize_grads=True))

    change = gradients("both") - gradients("ce")
    torch.testing.assert_close(change, lbd * gradients("mse"))
    head = sum(p.numel() for p in net.head.parameters())
    assert change[:-head].norm() > 1e-3 * gradients("ce").norm() and not change[-head:].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_label_s_share_in_a_matching_loss_is_a_jacobian_vector_product(form: FeatureForm) -> None:
    net, x, lbd = network(), normal(3, 3, 8, 8), 0.1
    encoder = nn.Sequential(*net.blocks)
    names, weights = zip(*encoder.named_parameters(), strict=True)
    labels = (own_labels(net, x, form) + 1).requires_grad_()

    def phi(*values: Tensor) -> Tensor:
        maps = torch.func.functional_call(encoder, dict(zip(names, values, strict=True)), (x,))
        return feature_of(maps, form, "avg")

    loss = lbd * feature_loss(encoder(x), labels, form, "avg").mean()
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    direction = tuple(normal(*p.shape, number=2) for p in weights)  # d distance / d slopes
    (found,) = torch.autograd.grad(slopes, labels, direction)
    product = torch.func.jvp(phi, weights, direction)[1]
    torch.testing.assert_close(found, -2 * lbd / labels.numel() * product)
    assert found.any()


@pytest.mark.parametrize("layer_idx", [None, 1, 2])
def test_label_through_own_head_of_its_own_map_gives_the_networks_loss(layer_idx: int | None) -> None:
    net, x, y = network(), normal(6, 3, 8, 8), torch.arange(6) % 5
    output, maps = net.with_map(x, layer_idx)
    logits = feature_logits(net, maps.detach(), "map", "avg", layer_idx, MAP)
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(output.logits, y))


def test_a_channel_label_is_read_at_every_pixel_by_the_network_s_own_head() -> None:
    net, labels, y = network().requires_grad_(False), normal(6, 4), torch.arange(6) % 5
    labels.requires_grad_()
    weight = net.head.weight.unflatten(1, (4, -1)).sum(2)  # [5, 4]: over the 2 x 2 pixels
    logits = feature_logits(net, labels, "channel", "avg", None, (4, 2, 2))
    torch.testing.assert_close(logits, labels @ weight.T + net.head.bias)
    torch.testing.assert_close(feature_logits(net, 4 * labels, "channel", "sum", None, (4, 2, 2)), logits)
    torch.testing.assert_close(feature_logits(net, labels, "channel", "max", None, (4, 2, 2)), logits)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, y), labels)
    torch.testing.assert_close(slope, (logits.softmax(1) - F.one_hot(y, 5)) @ weight / 6)


@pytest.mark.parametrize("pool", ["avg", "sum"])
def test_a_network_that_averages_its_map_reads_its_own_channels_as_its_map(pool: Pool) -> None:
    net, x = network(net_type="resnet10_ap", norm_type="batch").eval(), normal(2, 3, 8, 8)
    output, maps = net.with_map(x)
    logits = feature_logits(net, feature_of(maps, "channel", pool), "channel", pool, None, (512, 1, 1))
    torch.testing.assert_close(logits, output.logits)


def test_the_mean_of_labels_is_plain_and_one_at_random_is_drawn_a_sample() -> None:
    features, samples = normal(3, 4, 2, 5), torch.tensor([3, 1, 1] * 200)
    mean = drawn_labels(features, samples, "mean", generator(0, "test"))
    np.testing.assert_allclose(mean, features.numpy().mean(0)[samples.numpy()])
    drawn = drawn_labels(features, samples, "random", generator(0, "test"))
    hits = (drawn == features[:, samples]).all((2, 3))  # [3, 600]
    assert (hits.sum(0) == 1).all() and (hits.sum(1) - 200).abs().max() < 60
    assert (hits[:, 1::3] != hits[:, 2::3]).any()  # the same sample twice in a batch
    assert torch.equal(drawn, drawn_labels(features, samples, "random", generator(0, "test")))


def test_samples_of_a_class_share_its_labels_and_add_up_their_gradients() -> None:
    features, owner = normal(2, 3, 4).requires_grad_(), torch.tensor([0, 2, 2, 1, 2])
    shared = expand(features, owner, "class")
    assert torch.equal(shared, torch.stack([features[:, c] for c in owner.tolist()], 1))
    (slope,) = torch.autograd.grad(shared.sum(), features)
    assert torch.equal(slope[0, :, 0], owner.bincount().double())
    assert expand(features, owner, "sample") is features


def contrast(features: Tensor, owner: Tensor, form: FeatureForm) -> float:
    rows = []
    for label in features.flatten(0, 1).numpy():
        row = {"map": lambda v: v.mean((1, 2)), "channel": lambda v: v, "spatial": lambda v: v.ravel() - v.mean()}
        rows.append(row[form](label) / np.linalg.norm(row[form](label)))
    classes, losses = owner.tolist() * len(features), []
    for a, z in enumerate(rows):
        others = [b for b in range(len(rows)) if b != a]
        total = sum(math.exp(z @ rows[b] / TAU) for b in others)
        terms = [math.log(math.exp(z @ rows[b] / TAU) / total) for b in others if classes[b] == classes[a]]
        losses += [-sum(terms) / len(terms)] if terms else []
    return sum(losses) / len(losses)


@pytest.mark.parametrize("form", FORMS)
def test_contrast_is_its_double_sum_over_anchors_and_positives(form: FeatureForm) -> None:
    features, owner = normal(2, 6, *label_shape(MAP, form)), torch.tensor([0, 0, 1, 2, 1, 0])
    alone = features[:1], torch.tensor([0, 0, 1, 2, 1, 0])  # class 2: no anchor
    for values, classes in ((features, owner), alone):
        assert supervised_contrast(values, classes, form).item() == pytest.approx(contrast(values, classes, form))
    inputs = (features[:, :3].clone().requires_grad_(),)
    assert torch.autograd.gradcheck(lambda f: supervised_contrast(f, owner[:3], form, tau=0.5), inputs)


def test_contrast_of_two_opposite_classes_is_their_closed_form() -> None:
    n, z = 4, torch.tensor([1.0, 2.0], dtype=torch.float64)
    features, owner = torch.stack([z] * n + [-3 * z] * n)[None], torch.tensor([0] * n + [1] * n)
    expected = math.log(n - 1 + n * math.exp(-2 / TAU))
    assert supervised_contrast(features, owner, "channel").item() == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 5])
def test_contrast_of_one_label_a_class_is_zero_with_zero_gradient(form: FeatureForm, count: int) -> None:
    features = normal(1, count, *label_shape(MAP, form)).requires_grad_()
    loss = supervised_contrast(features, torch.arange(count), form)
    (slope,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0 and torch.equal(slope, torch.zeros_like(slope))


def test_a_label_of_zeros_gets_no_gradient_and_spoils_none() -> None:
    features = torch.cat([torch.zeros(1, 1, 4), normal(1, 3, 4)], 1).requires_grad_()
    (slope,) = torch.autograd.grad(supervised_contrast(features, torch.tensor([0, 0, 1, 1]), "channel"), features)
    assert slope.isfinite().all() and not slope[0, 0].any() and slope[0, 1:].any()


def test_contrast_keeps_no_more_than_one_similarity_a_pair() -> None:
    features, owner = normal(2, 20, 8, 2, 2).requires_grad_(), torch.arange(20) % 5
    sizes: list[int] = []

    def note(kept: Tensor) -> Tensor:
        sizes.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        supervised_contrast(features, owner, "map")
    assert max(sizes) == (20 * 2) ** 2


@pytest.mark.parametrize("form", FORMS)
def test_discriminability_is_the_ratio_of_mean_distances(form: FeatureForm) -> None:
    features, owner = normal(2, 5, *label_shape(MAP, form)), torch.tensor([0, 1, 1, 0, 2])
    rows, classes = features.flatten(0, 1).flatten(1).numpy(), owner.tolist() * 2
    pairs = [(a, b) for a in range(10) for b in range(a)]
    within = [np.linalg.norm(rows[a] - rows[b]) for a, b in pairs if classes[a] == classes[b]]
    between = [np.linalg.norm(rows[a] - rows[b]) for a, b in pairs if classes[a] != classes[b]]
    assert discriminability(features, owner) == pytest.approx(np.mean(within) / np.mean(between))
    assert math.isnan(discriminability(features[:1, 1:3], torch.tensor([0, 1])))
    assert math.isnan(discriminability(features, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize(
    ("label", "n_feat", "scope", "soft_labels", "expected"),
    [
        ((128,), 1, "sample", 0, (9, 48)),
        ((128, 4, 4), 1, "sample", 0, (6, 30)),
        ((4, 4), 1, "sample", 0, (9, 49)),
        ((128, 4, 4), 1, "class", 0, (9, 49)),
        ((128, 4, 4), 3, "class", 0, (8, 48)),
        ((), 0, "sample", 0, (10, 50)),  # without feature labels
        ((), 0, "sample", 100, (9, 48)),
        ((128,), 1, "sample", 10, (9, 47)),  # 153600 // 3210
        ((128, 4, 4), 20, "class", 0, (0, 36)),  # the class's labels alone take 13.3 images
    ],
)
def test_fair_ipc_is_the_largest_that_fits(
    label: tuple[int, ...], n_feat: int, scope: Scope, soft_labels: int, expected: tuple[int, int]
) -> None:
    for budget, ipc in zip((10, 50), expected, strict=True):
        assert fair_ipc(budget, IMAGE, label, n_feat, scope, soft_labels) == ipc
        assert not ipc or image_equivalents(IMAGE, label, n_feat, ipc, scope, soft_labels) <= budget
        assert image_equivalents(IMAGE, label, n_feat, ipc + 1, scope, soft_labels) > budget


@pytest.mark.parametrize(("scope", "size"), [("sample", 9), ("class", 3)])
@pytest.mark.parametrize("form", FORMS)
def test_floats_are_those_of_the_tensors(form: FeatureForm, scope: Scope, size: int) -> None:
    images, soft, features = torch.empty(9, 3, 8, 8), torch.empty(9, 5), torch.empty(2, size, *label_shape(MAP, form))
    stored = images.numel() + soft.numel() + features.numel()  # 3 classes, ipc 3
    assert 3 * float_count((3, 8, 8), label_shape(MAP, form), 2, 3, scope, soft_labels=5) == stored


@pytest.mark.parametrize(("ipc", "expected"), [(9, 15.0), (48, 80.0)])
def test_map_labels_take_two_thirds_of_an_image_each(ipc: int, expected: float) -> None:
    assert image_equivalents(IMAGE, (128, 4, 4), 1, ipc, "sample") == expected


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"form": "spatial", "feat_lbd": 0.02}, "feat_lbd: 0.02, but form: spatial has no channels .* set feat_lbd: 0"),
        ({"pooling": "sum"}, "pooling: sum, but form: map is not pooled; set avg, or form: channel"),
        ({"form": "spatial", "pooling": "max"}, "form: spatial is not pooled"),
        ({"lr_feat_rel": True, "lbd": 0.0}, "lbd is 0; set false"),
        ({"lr_feat_rel": True, "feat_opt": "adam"}, "Adam's steps do not shrink with the gradient; set false"),
        ({"layer_idx": 0}, "layer_idx"),
        ({"n_feat": 0}, "n_feat"),
    ],
)
def test_a_setting_that_has_no_meaning_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        FeatureConfig(**settings)


def test_a_spatial_label_has_no_logits() -> None:
    with pytest.raises(ConfigError, match="feature.form: spatial has no channels that a head could read; set feat_lbd"):
        feature_logits(network(), normal(2, 2, 2), "spatial", "avg", None, (4, 2, 2))
