"""Students with feature labels: their loss, their schedule's one selection, views, and students kept after a stop."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from condenser.feature_labels import FeatureConfig, feature_of, label_shape
from condenser.feature_student import (
    FeatureScore,
    FeatureSet,
    StudentConfig,
    accuracy,
    feature_set,
    judge_feature_student,
    student_loss,
)
from condenser.students import OnStep, judge_students
from condenser.synthetic_set import SyntheticSet
from config import ConfigError
from utils.ddp import World, process_group
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.stopping import StopFlag, Stopped
from utils.streams import generator
from utils.utils_image import ImageSet

CLASSES, SIZE, COUNT = 4, 8, 40
NORM = Normaliser(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]))
CPU, STREAM = torch.device("cpu"), (3, "student", 0)
FORMS = ("map", "channel", "spatial")
MAP = (8, 2, 2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


def network(norm: Any = "group") -> ImageNetwork:
    return image_network(ImageNetworkConfig(depth=2, width=8, norm_type=norm), 3, SIZE, CLASSES, 0, "test")


def images(seed: int, labels: Tensor | None = None, count: int = 50) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator(seed, "test"), dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES if labels is None else labels
    return ImageSet(pixels, torch.eye(CLASSES)[labels], SIZE, NORM)


def config(**settings: Any) -> StudentConfig:
    plain: dict[str, Any] = {
        "optimizer": "sgd", "lr": 0.05, "warmup": 0.0, "batch_size": COUNT, "steps": 12, "probe_every": 3,
    }  # fmt: skip
    return StudentConfig(**(plain | settings))


def trained_on(form: Any = "map", n_feat: int = 2) -> FeatureSet:
    x, owner = draw(COUNT, 3, SIZE, SIZE).float(), torch.arange(COUNT) % CLASSES
    labels = draw(n_feat, COUNT, *label_shape(MAP, form), seed=1).float()
    return FeatureSet(x, torch.eye(CLASSES)[owner], labels)


def judge(
    train: FeatureSet, feature: FeatureConfig | None, settings: StudentConfig, net: ImageNetwork | None = None,
    val: ImageSet | None = None, test: ImageSet | None = None, on_step: Callable[[], None] = lambda: None,
) -> tuple[FeatureScore, dict[str, Tensor]]:  # fmt: skip
    """Numbers of a student and its selected state."""
    net = net or network()
    val, test = val or images(1), test or images(2)
    score = judge_feature_student(net, train, feature, val, test, settings, CPU, STREAM, on_step)
    return score, {name: value.clone() for name, value in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def double(train: FeatureSet) -> FeatureSet:
    assert isinstance(train.images, Tensor) and train.labels is not None
    return FeatureSet(train.images.double(), train.targets.double(), train.labels.double())


@pytest.mark.parametrize("invariant", ["off", "train"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_goes_down_ce_plus_lambda_mse(form: Any, invariant: Any) -> None:
    train, net = double(trained_on(form)), network().double()
    assert isinstance(train.images, Tensor) and train.labels is not None
    f = FeatureConfig(lbd=0.7, form=form)
    loss = student_loss(net, train, f, config(batch_invariant=invariant), STREAM)(0)
    output, maps = net.with_map(train.images)
    target = torch.arange(COUNT) % CLASSES
    expected = F.cross_entropy(output.logits, target)
    expected = expected + 0.7 * F.mse_loss(feature_of(maps, form, "avg"), train.labels.mean(0))
    torch.testing.assert_close(loss, expected)
    for found, right in zip(*(torch.autograd.grad(v, list(net.parameters())) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("labels", [True, False])
def test_steps_of_tiles_are_plain_steps_to_rounding_and_the_same_from_run_to_run(labels: bool) -> None:
    f = FeatureConfig(lbd=0.3, use_feature="random") if labels else None
    mixed = {"aug_type": "color_crop_flip", "cutmix": 0.5}
    plain, tiles, again = (
        judge(trained_on(), f, config(batch_invariant=kind, **mixed)) for kind in ("off", "train", "train")
    )
    assert same(tiles[1], again[1]) and tiles[0].last == again[0].last
    for name, value in plain[1].items():
        torch.testing.assert_close(tiles[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("invariant", ["off", "train"])
@pytest.mark.parametrize("use", ["mean", "random"])
def test_labels_without_weight_change_no_bit(use: Any, invariant: Any) -> None:
    train, settings = trained_on(), config(aug_type="crop_flip", cutmix=0.5, batch_invariant=invariant, batch_size=15)
    zero = judge(train, FeatureConfig(lbd=0.0, use_feature=use), settings)
    none = judge(replace(train, labels=None), FeatureConfig(lbd=0.5), settings)
    unread = judge(train, None, settings)
    assert same(zero[1], none[1]) and same(none[1], unread[1])
    assert replace(zero[0], seconds=0.0) == replace(none[0], seconds=0.0)
    assert not same(zero[1], judge(train, FeatureConfig(lbd=0.5, use_feature=use), settings)[1])


@pytest.mark.parametrize("settings", [{"tta_mode": "none"}, {"tta": False, "tta_mode": "hflip"}])
def test_without_views_the_two_columns_are_equal(settings: dict[str, Any]) -> None:
    score, _ = judge(trained_on(), None, config(**settings))
    assert (score.last, score.selected) == (score.last_views, score.selected_views)


@pytest.mark.parametrize("invariant", ["off", "eval", "train"])
def test_views_are_the_mean_of_the_logits_of_image_and_mirror_image(invariant: Any) -> None:
    net, data = network().eval(), images(5, count=300)
    pixels = data.pixels(torch.arange(300))
    with torch.no_grad():
        net.head.bias.sub_(net(NORM(pixels)).logits.mean(0))  # predictions of every class
        plain, turned = net(NORM(pixels)).logits, net(NORM(pixels.flip(3))).logits
    right = [float((logits.argmax(1) == data.labels).double().mean()) for logits in (plain, plain + turned)]
    found = [accuracy(net.train(), data, mode, invariant, CPU) for mode in ("none", "hflip")]
    assert found == pytest.approx([100 * value for value in right]) and right[0] != right[1]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_validation_alone_selects_among_the_probed_states(norm: Any) -> None:
    states, net = list[dict[str, Tensor]](), network(norm)
    first, settings = {name: value.clone() for name, value in net.state_dict().items()}, config(lr=0.3)

    def note() -> None:
        states.append({name: value.clone() for name, value in net.state_dict().items()})

    train = replace(trained_on(), labels=None)
    judge(train, None, settings, net, on_step=note)

    def says(state: dict[str, Tensor], data: ImageSet) -> Tensor:
        net.load_state_dict(state)
        with torch.no_grad():
            return net.eval()(data.input(torch.arange(len(data)), CPU)).logits.argmax(1)

    early, last = states[5], states[-1]  # the second of four probes
    val = images(1, says(early, images(1)))
    test = images(2, says(last, images(2)))
    expected = float((says(early, test) == test.labels).double().mean())
    assert not says(last, val).equal(val.labels) and not says(states[2], val).equal(val.labels) and expected < 1
    net.load_state_dict(first)
    score, selected = judge(train, None, settings, net, val, test)
    assert score.last == 100 and score.selected == pytest.approx(100 * expected)
    assert same(selected, early)
    net.load_state_dict(first)
    assert same(judge(train, None, settings, net, val, images(2))[1], early)


def test_a_class_s_prototypes_stand_beside_each_of_its_images() -> None:
    owner = torch.tensor([0, 2, 2, 0, 3])  # a debug run has not every class
    features = draw(2, 3, *MAP)
    found = SyntheticSet(torch.rand(5, 3, 8, 8), torch.eye(4)[owner], owner, None, {"scope": "class"}, features, NORM)
    read = feature_set(found, True)
    assert read.labels is not None and torch.equal(read.labels, features[:, [0, 1, 1, 0, 2]])
    assert isinstance(read.images, Tensor)
    torch.testing.assert_close(read.images, NORM(found.data))
    assert feature_set(found, False).labels is None
    own = replace(found, meta={}, features=draw(2, 5, *MAP))
    assert feature_set(own, True).labels is own.features
    with pytest.raises(ConfigError, match="no normaliser.*make it anew"):
        feature_set(replace(found, normaliser=None), True)


@pytest.fixture
def world() -> Iterator[World]:
    with process_group(CPU) as world:
        yield world


def test_students_that_have_ended_outlive_a_stop(world: World, tmp_path: Path) -> None:
    begun, flag = list[int](), StopFlag()

    def one(number: int, on_step: OnStep) -> dict[str, float]:
        begun.append(number)
        if begun == [0, 1]:
            flag.number = signal.SIGINT
        on_step()
        return {"last": 10.0 * number}

    with pytest.raises(Stopped) as stopped:
        judge_students(tmp_path, "abc", 1, one, world, flag)
    assert stopped.value.status == 130 and [file.name for file in (tmp_path / "students").iterdir()] == ["a.json"]
    (tmp_path / "students" / "a.json").write_text(json.dumps({"last": 99.0}))
    found = judge_students(tmp_path, "abc", 1, one, world, StopFlag())
    assert begun == [0, 1, 1, 2] and [row["last"] for row in found] == [99.0, 10.0, 20.0]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"tta_mode": "hflp"}, "view: hflp is not one of .*did you mean 'hflip'"),
        ({"aug_type": "flp"}, "augmentation: 'flp' is not one of"),
        ({"cutmix": 0.5, "mixup": 0.5}, "both mix images; set one to 0"),
        ({"batch_invariant": "on"}, "batch_invariant"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_student_s_setting_that_has_no_meaning_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        config(**settings)
