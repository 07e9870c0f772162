"""MTT and DATM with feature labels: an iteration is a plain unroll's, whoever shares its work; guards, ends, starts."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from condenser import trajectory_condenser
from condenser.feature_labels import FeatureConfig, label_shape
from condenser.loop import learning_loop
from condenser.synthetic_set import SyntheticSet, load_synthetic
from condenser.trajectory import Match, flat_parameters
from condenser.trajectory_condenser import TrajectoryCondenser, TrajectoryConfig
from config import ConfigError
from distill_feat.trajectory_job import TrajectoryJob
from utils.augment import draw_augmentation
from utils.checkpoint import load_pth
from utils.ddp import World, process_group
from utils.expert_buffers import ExpertBuffer, ExpertNotes, parameters_of
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.run_folder import RunFolder
from utils.stopping import StopFlag, Stopped
from utils.streams import generator
from utils.utils_image import ImageSet

CLASSES, IPC, SIZE, WIDTH, DEPTH, SEED, EXPERTS, EPOCHS = 3, 2, 8, 4, 2, 7, 2, 6
N = CLASSES * IPC
OWNER = torch.arange(CLASSES).repeat_interleave(IPC)
NORM = Normaliser(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]))
DSA = "color/crop/cutout/flip/scale/rotate"
CPU = torch.device("cpu")
exactly = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


def network(number: int = 0, norm: Any = "group") -> ImageNetwork:
    settings = ImageNetworkConfig(depth=DEPTH, width=WIDTH, norm_type=norm)
    return image_network(settings, 3, SIZE, CLASSES, SEED, "test", number).double()


class Walkers(ExpertBuffer):
    """Experts that walk at random, in memory; knows what was drawn."""

    def __init__(self, first: int = 0, count: int = EXPERTS) -> None:
        self.count, self.folder, self.drawn = count, Path("walkers"), list[tuple[int, int]]()
        self.notes = ExpertNotes(
            dataset="test", zca="", parameters=parameters_of(network()), first=first, last=EPOCHS, settings={}
        )
        self.rows = []
        for i in range(count):
            start = flat_parameters(network(i))
            self.rows.append(start + 0.03 * draw(EPOCHS + 1, len(start), seed=10 + i).cumsum(0))

    def __len__(self) -> int:
        return self.count

    def draw(self, expert: int, epoch: int) -> Tensor:
        self.check_epoch(epoch)
        self.drawn.append((expert, epoch))
        return self.rows[expert][epoch].clone()


ALONE = World(0, 1, CPU)
PLAIN: dict[str, Any] = {
    "ipc": IPC, "niter": 4, "syn_steps": 3, "batch_syn": 4, "expert_epochs": 2, "max_start_epoch": 4, "lr_img": 0.5,
    "lr_lr": 1e-3, "lr_teacher": 0.05, "lr_y": 0.3, "aug_type": DSA, "micro_batch": 3, "memory_budget": 0.0,
}  # fmt: skip


def make(feature: FeatureConfig | None = None, world: World = ALONE, **settings: Any) -> TrajectoryCondenser:
    s = TrajectoryConfig(**PLAIN | settings)
    features = None
    maps = (WIDTH, SIZE // 2, SIZE // 2) if feature and feature.layer_idx == 1 else (WIDTH, SIZE // 4, SIZE // 4)
    if feature:
        rows = N if feature.scope == "sample" else CLASSES
        features = draw(feature.n_feat, rows, *label_shape(maps, feature.form), seed=1)
    targets = torch.eye(CLASSES, dtype=torch.float64)[OWNER]
    targets = draw(N, CLASSES, seed=3).softmax(1) if s.soft_labels else targets
    pixels = torch.sigmoid(draw(N, 3, SIZE, SIZE))
    return TrajectoryCondenser(
        settings=s, feature=feature, start=SyntheticSet(pixels, targets, OWNER, None, {}, features, NORM),
        normaliser=NORM, network=network(), map_shape=maps, experts=Walkers(), seed=SEED, world=world,
        meta={"scope": feature.scope} if feature else {},
    )  # fmt: skip


def named(theta: Tensor) -> dict[str, Tensor]:
    """Parameters of a flat vector."""
    shapes = [tuple(p.shape) for p in network().parameters()]
    parts = theta.split([math.prod(shape) for shape in shapes])
    names = [name for name, _ in network().named_parameters()]
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def block(p: dict[str, Tensor], i: int, x: Tensor) -> Tensor:
    x = F.conv2d(x, p[f"blocks.{i}.0.weight"], p[f"blocks.{i}.0.bias"], padding=1)
    return F.avg_pool2d(F.relu(F.group_norm(x, 4, p[f"blocks.{i}.1.weight"], p[f"blocks.{i}.1.bias"])), 2)


def head(p: dict[str, Tensor], maps: Tensor) -> Tensor:
    return F.linear(maps.flatten(1), p["head.weight"], p["head.bias"])


def contrast(z: Tensor, owner: list[int]) -> Tensor:
    """Khosla et al. (2020), L_out, written out."""
    z, terms = F.normalize(z, dim=1), []
    for a in range(len(z)):
        same = [p for p in range(len(z)) if p != a and owner[p] == owner[a]]
        others = torch.stack([z[a] @ z[b] / 0.07 for b in range(len(z)) if b != a])
        if same:
            terms.append(-torch.stack([z[a] @ z[p] / 0.07 - others.logsumexp(0) for p in same]).mean())
    return torch.stack(terms).mean() if terms else z.sum() * 0


class Plain:
    """The published loop: one graph through all steps of a student, torch's own optimisers."""

    def __init__(self, condenser: TrajectoryCondenser) -> None:
        c = condenser
        self.s, self.f, self.experts = c.settings, c.feature, Walkers()
        self.x = c.data.detach().clone().requires_grad_()
        self.y = c.logits.detach().clone().requires_grad_()
        self.raw = c.raw_rate.detach().clone().requires_grad_()
        self.labels = None if c.labels is None else c.labels.detach().clone().requires_grad_()
        s, sgd = self.s, torch.optim.SGD
        self.optimizers: list[torch.optim.Optimizer] = [sgd([self.raw], s.lr_lr, s.mom_lr)]
        if s.learn_images:
            self.optimizers.append(sgd([self.x], s.lr_img, s.mom_img))
        if s.soft_labels:
            self.optimizers.append(sgd([self.y], s.lr_y, s.mom_y))
        if self.f and self.f.learn and self.labels is not None:
            f = self.f
            adam = f.feat_opt == "adam"
            self.optimizers.append(
                torch.optim.Adam([self.labels], f.lr_feat) if adam else sgd([self.labels], f.lr_feat, f.mom_feat)
            )

    @property
    def alpha(self) -> Tensor:
        s = 0.1 * self.s.lr_teacher
        return ((self.raw + (self.raw**2 + 4 * s * s).sqrt()) / 2)[0]

    @property
    def targets(self) -> Tensor:
        return self.y.softmax(1) if self.s.soft_labels else torch.eye(CLASSES, dtype=torch.float64)[OWNER]

    def student(self, done: int, number: int) -> tuple[Tensor, Tensor]:
        """Trajectory loss, and what feature labels go down besides."""
        s, f, gen = self.s, self.f, generator(SEED, "trajectory", done, number)
        expert = int(torch.randint(EXPERTS, (1,), generator=gen))
        epoch = s.min_start_epoch + int(torch.randint(s.max_start_epoch - s.min_start_epoch, (1,), generator=gen))
        first, last = self.experts.rows[expert][epoch], self.experts.rows[expert][epoch + s.expert_epochs]
        theta, target, batches = first.clone().requires_grad_(), named(last), list[Tensor]()
        extra, depth = torch.zeros((), dtype=torch.float64), (f.layer_idx or DEPTH) if f else DEPTH
        for step in range(s.syn_steps):
            if not batches:
                order = torch.randperm(N, generator=gen)
                size = s.batch_syn or N
                batches = [order[i : i + size] for i in range(0, N, size)]
            ids = batches.pop(0)
            stream = generator(SEED, "student's view", done, number, step)
            x, p = draw_augmentation(s.aug_type, len(ids), stream)(self.x[ids]), named(theta)
            maps = [x]
            for i in range(DEPTH):
                maps.append(block(p, i, maps[-1]))
            loss = F.cross_entropy(head(p, maps[-1]), self.targets[ids])
            if f and self.labels is not None:
                several = self.labels[ids] if f.scope == "sample" else self.labels[OWNER[ids]]
                if f.use_feature == "random":
                    which = torch.randint(f.n_feat, (len(ids),), generator=stream)
                    goal = torch.stack([row[k] for row, k in zip(several, which, strict=True)])
                else:
                    goal = several.mean(1)
                shown = {"map": maps[depth], "channel": maps[depth].mean((2, 3)), "spatial": maps[depth].mean(1)}
                loss = loss + f.lbd * F.mse_loss(shown[f.form], goal)
                for k in range(f.n_feat if f.feat_lbd else 0):
                    found = several[:, k]
                    found = found if f.form == "map" else found[..., None, None].expand(-1, -1, *maps[depth].shape[2:])
                    for i in range(depth, DEPTH):
                        found = block(target, i, found)
                    ce = F.cross_entropy(head(target, found), self.targets[ids].detach())
                    extra = extra + f.feat_lbd / f.n_feat * ce
            (g,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - self.alpha * g
        if f and f.lbd_contrast and self.labels is not None:
            rows = self.labels.transpose(0, 1).flatten(0, 1)  # label after label
            z = rows.flatten(2).mean(2) if f.form == "map" else rows.flatten(1)
            z = z - z.mean(1, keepdim=True) if f.form == "spatial" else z
            own = OWNER.tolist() if f.scope == "sample" else list(range(CLASSES))
            extra = extra + f.lbd_contrast * contrast(z, own * f.n_feat)
        return (theta - last).square().sum() / (first - last).square().sum(), extra

    def iterate(self, done: int) -> list[float]:
        """An iteration; the losses of its students."""
        found = [self.student(done, number) for number in range(self.s.starts)]
        kept = [(loss, extra) for loss, extra in found if not loss > (self.s.threshold or math.inf)]
        leaves = [g["params"][0] for o in self.optimizers for g in o.param_groups]
        for leaf in leaves:
            leaf.grad = None
        if kept:
            torch.stack([loss for loss, _ in kept]).mean().backward(retain_graph=True)
            extra = torch.stack([extra for _, extra in kept]).mean()
            if self.f and self.f.learn and self.labels is not None and extra.requires_grad:
                assert self.labels.grad is not None
                self.labels.grad += torch.autograd.grad(extra, self.labels)[0]
            for optimizer in self.optimizers:
                optimizer.step()
        return [loss.item() for loss, _ in found]


def same(condenser: TrajectoryCondenser, plain: Plain, check: Callable[[Any, Any], None] = exactly) -> None:
    check(condenser.data.detach(), plain.x.detach())
    check(condenser.logits.detach(), plain.y.detach())
    check(condenser.raw_rate.detach(), plain.raw.detach())
    check(condenser.alpha.detach(), plain.alpha.detach())
    if condenser.labels is not None:
        assert plain.labels is not None
        check(condenser.labels.detach(), plain.labels.detach())


def values(condenser: TrajectoryCondenser) -> list[Tensor]:
    return [part.own.detach().clone() for part in condenser.learned.values()]


def label(**more: Any) -> FeatureConfig:
    return FeatureConfig(**{"lbd": 0.5, "lr_feat": 0.02} | more)


CASES: dict[str, tuple[FeatureConfig | None, dict[str, Any]]] = {
    "no F": (None, {}),
    "no F, soft": (None, {"soft_labels": True}),
    "map": (label(), {}),
    "map of a class, mean of two, soft": (label(n_feat=2, scope="class", feat_lbd=0.2), {"soft_labels": True}),
    "map of block 1, sgd": (label(layer_idx=1, feat_opt="sgd", feat_lbd=0.3, n_feat=2, use_feature="random"), {}),
    "channel, one of two, contrast": (
        label(form="channel", n_feat=2, use_feature="random", feat_lbd=0.2, lbd_contrast=0.1), {"soft_labels": True}
    ),
    "channel of a class, one of two": (
        label(form="channel", scope="class", n_feat=2, use_feature="random", lbd_contrast=0.1), {}
    ),
    "spatial, contrast": (label(form="spatial", lbd_contrast=0.1), {}),
    "spatial of a class, one of two, soft": (
        label(form="spatial", scope="class", n_feat=2, use_feature="random"), {"soft_labels": True}
    ),
    "two starts": (label(n_feat=2, use_feature="random", feat_lbd=0.2, lbd_contrast=0.1), {"starts": 2}),
    "images frozen": (label(form="channel", feat_lbd=0.2), {"learn_images": False}),
    "F frozen": (label(form="channel", learn=False, feat_lbd=0.2, lbd_contrast=0.1), {}),
    "soft labels alone": (None, {"learn_images": False, "soft_labels": True}),
    "step size fixed": (label(), {"lr_lr": 0.0}),
    "whole set, later epochs": (label(), {"batch_syn": None, "min_start_epoch": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_iteration_is_the_full_unroll_s_and_torch_s_optimisers(case: str) -> None:
    feature, settings = CASES[case]
    condenser = make(feature, **settings)
    plain, before = Plain(condenser), values(condenser)
    for done in range(3):
        found, losses = condenser.iterate(done), plain.iterate(done)
        assert found["match"] == pytest.approx(sum(losses), rel=1e-10) and found["count"] == len(losses)
        assert 0.5 < found["match"] / found["count"] < 1.5
        same(condenser, plain)
    moves = [float((a - b).abs().max()) for a, b in zip(values(condenser), before, strict=True)]
    assert moves and min(moves) > 1e-6
    assert set(condenser.learned) == (
        {"data", "logits", "features", "rate"}
        - ({"logits"} if not settings.get("soft_labels") else set())
        - (set() if feature and feature.learn else {"features"})
        - ({"rate"} if settings.get("lr_lr") == 0 else set())
        - ({"data"} if settings.get("learn_images") is False else set())
    )


@pytest.mark.parametrize("term", ["feat_lbd", "lbd_contrast"])
@pytest.mark.parametrize("starts", [1, 2])
def test_terms_of_the_labels_move_the_labels_only(term: str, starts: int) -> None:
    sgd: dict[str, Any] = {"form": "channel", "feat_opt": "sgd", "lr_feat": 1.0, "mom_feat": 0.0}
    runs = []
    for weight in (0.0, 0.3, 0.6):
        condenser = make(label(**sgd, **{term: weight}), starts=starts)
        condenser.iterate(0)
        runs.append(values(condenser))
    for (x, f, rate), (x_0, f_0, rate_0) in zip(runs[1:], [runs[0]] * 2, strict=True):
        assert torch.equal(x, x_0) and torch.equal(rate, rate_0) and not torch.allclose(f, f_0, rtol=0, atol=1e-4)
    exactly(runs[2][1] - runs[0][1], 2 * (runs[1][1] - runs[0][1]))


def test_neither_micro_batches_nor_kept_graphs_change_the_result() -> None:
    found = []
    for micro, budget in ((None, 2.0), (1, 0.0), (3, 0.0), (2, 1e-4)):
        condenser = make(label(feat_lbd=0.1), micro_batch=micro, memory_budget=budget, soft_labels=True)
        for done in range(2):
            condenser.iterate(done)
        found.append((condenser.keep, values(condenser)))
    assert {keep for keep, _ in found} >= {0, 3}
    for _, other in found[1:]:
        for one, two in zip(found[0][1], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_micro_batch_is_as_large_as_its_graph_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    theta = sum(p.nbytes for p in network().parameters())
    graphs = [make(label()).measure_memory([slice(0, samples)]).graph - theta for samples in (1, 2, 3, 4)]
    for samples in (1, 2, 3):
        monkeypatch.setattr(trajectory_condenser, "CPU_GRAPH", (graphs[samples - 1] + graphs[samples]) // 2)
        assert make(label(), micro_batch=None).most == samples
    monkeypatch.setattr(trajectory_condenser, "CPU_GRAPH", 1)
    assert make(label(), micro_batch=None).most == 1


def test_tesla_is_exact_for_one_step_only() -> None:
    for steps in (1, 3):
        runs = []
        for mode in ("exact", "tesla"):
            condenser = make(label(form="channel"), mode=mode, syn_steps=steps)
            condenser.iterate(0)
            runs.append(values(condenser)[0])
        assert torch.allclose(runs[0], runs[1], rtol=0, atol=1e-13) == (steps == 1)


def test_a_loss_over_the_threshold_moves_nothing_and_is_counted() -> None:
    condenser = make(label(), soft_labels=True)
    plain = Plain(condenser)
    condenser.iterate(0)
    plain.iterate(0)
    loss = plain.student(1, 0)[0].item()
    before = values(condenser)
    momenta = {k: {m: v.clone() for m, v in p.optimizer.state[p.own].items()} for k, p in condenser.learned.items()}
    condenser.settings = condenser.settings.model_copy(update={"threshold": 0.999 * loss})
    found = condenser.iterate(1)
    assert (found["skipped"], found["count"]) == (1, 1) and found["match"] == pytest.approx(loss)
    for one, other in zip(before, values(condenser), strict=True):
        assert torch.equal(one, other)
    for name, part in condenser.learned.items():
        state = part.optimizer.state[part.own]
        assert state.keys() == momenta[name].keys() and all(torch.equal(state[m], v) for m, v in momenta[name].items())
    condenser.settings = condenser.settings.model_copy(update={"threshold": 1.001 * loss})
    assert condenser.iterate(1)["skipped"] == 0
    plain.iterate(1)
    same(condenser, plain)


def test_starts_under_the_threshold_move_the_set_by_their_own_mean() -> None:
    plain = Plain(make(label(), starts=3))
    losses = sorted(plain.student(0, number)[0].item() for number in range(3))
    for limit, skipped in (((losses[1] + losses[2]) / 2, 1), ((losses[0] + losses[1]) / 2, 2)):
        condenser = make(label(feat_lbd=0.2), starts=3, threshold=limit)
        plain = Plain(condenser)
        found = condenser.iterate(0)
        plain.iterate(0)
        assert found["skipped"] == skipped and found["count"] == 3
        same(condenser, plain)


@pytest.fixture
def world() -> Iterator[World]:
    with process_group(CPU) as world:
        yield world


def learn(condenser: TrajectoryCondenser, folder: Path, flag: StopFlag | None = None) -> Path:
    """The run folder of a loop, unscored."""
    run = RunFolder(folder, {}, condenser.world)
    learning_loop(condenser, run, flag or StopFlag(), lambda found: 0.0, False)
    return run.folder


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_loop_with_the_last_state_kept(
    world: World, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condenser, calls = make(label(), world, checkpoint_every=1, niter=6), list[int]()
    real = trajectory_condenser.match_trajectory

    def match(*words: Any) -> Match:
        calls.append(0)
        found = real(*words)
        assert found.gradients is not None
        if len(calls) < 4:
            return found
        if what == "loss":
            return Match(math.nan, found.end, None)
        return Match(found.loss, found.end, tuple(g * math.inf for g in found.gradients))

    monkeypatch.setattr(trajectory_condenser, "match_trajectory", match)
    for _ in range(2):  # again on going on
        with pytest.raises(ConfigError, match="iteration 4: the loss is not finite; the last saved state is kept") as e:
            learn(condenser, tmp_path)
        assert "\n" not in str(e.value)
        state = load_pth(tmp_path / "state.pth")
        assert state["iteration"] == 3 and all(v.isfinite().all() for v in state["rows"].values())
        for one, (name, _) in zip(values(condenser), condenser.learned.items(), strict=True):
            assert torch.equal(one, state["rows"][name])  # nothing moved any more


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [1e-3, 1e6, 1e30])
def test_the_step_size_stays_positive_however_fast_it_is_learned(sign: int, size: float) -> None:
    condenser = make(lr_lr=1e9, lr_teacher=0.01)
    assert condenser.alpha.item() == pytest.approx(0.01, rel=1e-12)
    zeros = [torch.zeros_like(leaf) for leaf in condenser.leaves]
    for _ in range(3):
        condenser.move([*zeros, torch.full((1,), sign * size, dtype=torch.float64)])
        alpha = condenser.alpha.item()
        assert 0 < alpha < math.inf and (alpha < 0.01) == (sign > 0)


def test_starts_are_drawn_from_the_window_only() -> None:
    condenser = make(min_start_epoch=1, max_start_epoch=4)
    experts = condenser.experts
    assert isinstance(experts, Walkers)
    experts.drawn.clear()
    for done in range(100):
        condenser.draw(done, 0)
    begins, ends = experts.drawn[::2], experts.drawn[1::2]
    assert set(begins) == {(expert, epoch) for expert in range(EXPERTS) for epoch in (1, 2, 3)}
    assert ends == [(expert, epoch + 2) for expert, epoch in begins]


def test_the_window_grows_to_its_end() -> None:
    condenser = make(min_start_epoch=1, current_max_start_epoch=2, max_start_epoch=5, expansion_end_epoch=9)
    experts = condenser.experts
    assert isinstance(experts, Walkers)
    ends = {0: 2, 2: 2, 3: 3, 5: 3, 6: 4, 8: 4, 9: 5, 1000: 5}
    for done, end in ends.items():
        experts.drawn.clear()
        for number in range(60):
            condenser.draw(done, number)
        assert {epoch for _, epoch in experts.drawn[::2]} == set(range(1, end))


@pytest.mark.parametrize("window", [(2, None, 2), (3, 2, 5), (0, 6, 5)])
def test_an_empty_window_is_refused(window: tuple[int, int | None, int]) -> None:
    low, current, high = window
    with pytest.raises(ValueError, match="must rise"):
        TrajectoryConfig(ipc=1, min_start_epoch=low, current_max_start_epoch=current, max_start_epoch=high)


def test_every_sample_is_seen_once_before_any_is_seen_again() -> None:
    condenser = make(syn_steps=4)
    for number in range(5):
        parts = condenser.draw(0, number).batches
        assert [len(part) for part in parts] == [4, 2, 4, 2]
        for pair in (parts[:2], parts[2:]):
            assert sorted(torch.cat(pair).tolist()) == list(range(N))
    orders = {tuple(torch.cat(condenser.draw(0, number).batches).tolist()) for number in range(5)}
    assert len(orders) == 5


@dataclass(frozen=True)
class Threads(World):
    """A rank that is a thread."""

    gate: threading.Barrier
    box: list[Tensor]

    def sum(self, value: Tensor) -> Tensor:
        self.box[self.rank] = value.clone()
        self.gate.wait(60)
        value.copy_(torch.stack(list(self.box)).sum(0))
        self.gate.wait(60)
        return value


def on_ranks(size: int, feature: FeatureConfig | None, **settings: Any) -> list[TrajectoryCondenser]:
    """The learners of `size` ranks after two iterations."""
    gate, box, faults = threading.Barrier(size), [torch.zeros(0)] * size, list[BaseException]()
    made = [make(feature, Threads(rank, size, CPU, gate, box), **settings) for rank in range(size)]

    def run(rank: int) -> None:
        try:
            for done in range(2):
                made[rank].iterate(done)
        except BaseException as error:
            faults.append(error)
            gate.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults, faults
    return made


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {}), (3, {"micro_batch": None}), (2, {"memory_budget": 1.0}), (5, {"micro_batch": 1}),
        (2, {"starts": 3}), (3, {"starts": 2}), (2, {"mode": "tesla"}),
    ],
)  # fmt: skip
def test_ranks_learn_what_one_learns(size: int, settings: dict[str, Any]) -> None:
    feature = label(n_feat=2, use_feature="random", feat_lbd=0.2, lbd_contrast=0.1)
    alone, every = (on_ranks(count, feature, soft_labels=True, **settings) for count in (1, size))
    for condenser in every:
        for own, one, other in zip(values(every[0]), values(condenser), values(alone[0]), strict=True):
            assert torch.equal(own, one)
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_ranks_skip_what_one_skips() -> None:
    plain = Plain(make(label(), starts=2))
    losses = sorted(plain.student(0, number)[0].item() for number in range(2))
    limit = sum(losses) / 2
    for starts, size in ((2, 2), (1, 2)):
        alone, every = (on_ranks(count, label(), starts=starts, threshold=limit) for count in (1, size))
        for condenser in every:
            for one, other in zip(values(condenser), values(alone[0]), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("soft, labels", [(False, False), (True, False), (False, True)])
def test_the_gathered_set_is_what_was_learned_as_pixels(soft: bool, labels: bool) -> None:
    condenser = make(label(n_feat=2) if labels else None, soft_labels=soft)
    condenser.iterate(0)
    found = condenser.gather()
    assert found is not None and found.normaliser is NORM and found.meta["lr"] == condenser.alpha.item()
    exactly(NORM(found.data), condenser.data.detach())
    exactly(found.targets.sum(1), torch.ones(N, dtype=torch.float64))
    assert torch.equal(found.targets, torch.eye(CLASSES, dtype=torch.float64)[OWNER]) != soft
    assert (found.features is not None) == labels
    if condenser.labels is not None:
        assert found.features is not None and torch.equal(found.features[1], condenser.labels.detach()[:, 1])


@pytest.mark.parametrize("feature", [label(feat_lbd=0.1), label(feat_opt="sgd", form="channel", n_feat=2)])
def test_a_stopped_run_goes_on_to_the_same_bits(world: World, feature: FeatureConfig, tmp_path: Path) -> None:
    def run(name: str, stop: int | None) -> Path:
        flag = StopFlag()
        condenser = make(feature, world, soft_labels=True, starts=2)
        iterate = condenser.iterate

        def stopping(done: int) -> dict[str, float]:
            if done == stop:
                flag.number = signal.SIGTERM
            return iterate(done)

        condenser.iterate = stopping  # type: ignore[method-assign]
        return learn(condenser, tmp_path / name, flag)

    for stop in (0, 2):
        with pytest.raises(Stopped):
            run("parts", stop)
    whole, parts = run("whole", None), run("parts", None)
    one, other = (load_synthetic(folder / "distilled_data" / "syn_data_best.pth") for folder in (whole, parts))
    assert torch.equal(one.data, other.data) and torch.equal(one.targets, other.targets) and one.meta == other.meta
    one_state, other_state = (load_pth(folder / "state.pth")["rows"] for folder in (whole, parts))
    assert one_state.keys() == other_state.keys() and len(one_state) > 7
    assert all(torch.equal(one_state[name], other_state[name]) for name in one_state)
    lines = [(folder / "metrics.jsonl").read_text() for folder in (whole, parts)]
    assert lines[0] == lines[1] and lines[0].count("\n") == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"network": network(norm="batch")}, "network.norm_type: batch.*set instance"),
        ({"settings": TrajectoryConfig(**PLAIN | {"max_start_epoch": 6})}, "keeps epochs 0 to 6, not 7: lower max_"),
        ({"settings": TrajectoryConfig(**PLAIN | {"expert_epochs": 4})}, "not 7: lower max_start_epoch or expert_ep"),
        ({"experts": Walkers(first=1)}, "keeps epochs 1 to 6, not 0"),
    ],
)
def test_what_cannot_be_matched_is_refused_before_it_starts(change: dict[str, Any], text: str) -> None:
    targets = torch.eye(CLASSES, dtype=torch.float64)[OWNER]
    words: dict[str, Any] = {
        "settings": TrajectoryConfig(**PLAIN), "feature": None, "normaliser": NORM, "network": network(),
        "start": SyntheticSet(torch.sigmoid(draw(N, 3, SIZE, SIZE)), targets, OWNER), "map_shape": (WIDTH, 2, 2),
        "experts": Walkers(), "seed": SEED, "world": ALONE, "meta": {},
    }  # fmt: skip
    assert TrajectoryCondenser(**words).memory.plain > 0
    with pytest.raises(ConfigError, match=text) as error:
        TrajectoryCondenser(**words | change)
    assert "\n" not in str(error.value)


def test_the_estimate_of_memory_is_said_with_what_is_kept() -> None:
    said = make(label(), memory_budget=0.0).describe_memory()
    assert "3 steps of 4 samples in 2 micro-batches of 2, the graphs of the last 0 steps kept" in said
    assert "the graphs of the last 3 steps kept" in make(label(), memory_budget=1.0).describe_memory()


COUNT = 4  # real images a class


class Job(TrajectoryJob):
    """Real images of one colour each, their number, and experts that answer from a table [experts, N, classes]."""

    def __init__(self, table: Tensor | None, init: str = "correct", ipc: int = IPC, soft: bool = True) -> None:
        numbers = torch.arange(CLASSES * COUNT)
        pixels = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, SIZE, SIZE).contiguous()
        self.table, self.asked = table, list[int]()
        self.train = ImageSet(pixels, torch.eye(CLASSES)[numbers % CLASSES], SIZE, NORM)
        self.kept, self.ipc, self.world, self.flag = [*range(CLASSES)], ipc, ALONE, StopFlag()
        self.experts = Walkers(count=EXPERTS if table is None else len(table))
        self.cfg: Any = SimpleNamespace(
            condense=TrajectoryConfig(ipc=ipc, init=init, soft_labels=soft),  # type: ignore[arg-type]
            dataset=SimpleNamespace(nclass=CLASSES), feature=None,
        )  # fmt: skip

    def notes(self) -> dict[str, Any]:
        return {}

    def fresh(self, seed: int, purpose: str, *ids: int, kind: Any = None) -> ImageNetwork:
        return network(9).float()

    def last_logits(self, expert: int, images: ImageSet | Tensor) -> Tensor:
        self.asked.append(expert)
        if self.table is None:
            return super().last_logits(expert, images)
        pixels = images if isinstance(images, Tensor) else images.pixels(torch.arange(len(images)))
        return self.table[expert][(pixels[:, 0, 0, 0] * 255).round().long()]


def answers(*right: set[int], seed: int = 0) -> Tensor:
    """Logits of one expert for each set: right on these images, wrong on the others."""
    labels = torch.arange(CLASSES * COUNT) % CLASSES
    logits = draw(len(right), len(labels), CLASSES, seed=seed).float()
    for expert, ids in enumerate(right):
        for i, c in enumerate(labels.tolist()):
            wanted = c if i in ids else (c + 1) % CLASSES
            logits[expert, i, wanted] = 5 + logits[expert, i].abs().max()
    return logits


def numbers_of(found: SyntheticSet) -> list[int]:
    return (found.data[:, 0, 0, 0] * 255).round().long().tolist()


def test_an_expert_s_last_logits_are_its_last_network_s() -> None:
    job = Job(None)
    net = network(9).float()
    torch.nn.utils.vector_to_parameters(job.experts.draw(1, EPOCHS).float(), net.parameters())
    expected = net.eval()(NORM(job.train.pixels(torch.arange(12)))).logits.detach()
    for images in (job.train, job.train.pixels(torch.arange(12))):
        torch.testing.assert_close(job.last_logits(1, images), expected)


def test_chosen_images_are_right_by_expert_0_then_by_another_then_any() -> None:
    # Classes are numbers modulo 3. Class 0 has three right images, class 1 one and another by expert 1, class 2 none.
    job = Job(answers({0, 3, 9, 4}, {10, 6}))
    picks = [job.first_images(seed) for seed in range(20)]
    for found in picks:
        ids = numbers_of(found)
        assert found.owner.tolist() == OWNER.tolist() == [i % CLASSES for i in ids] and len(set(ids)) == N
        assert set(ids[:2]) < {0, 3, 9} and ids[2:4] == [4, 10]
    assert len({tuple(numbers_of(found)[:2]) for found in picks}) == 6
    assert {i for found in picks for i in numbers_of(found)[4:]} == {2, 5, 8, 11}
    assert numbers_of(job.first_images(3)) == numbers_of(picks[3])


def test_only_as_many_experts_are_asked_as_are_needed() -> None:
    job = Job(answers(set(range(12)), set()))
    job.right_images(0)
    assert job.asked == [0]


def test_soft_labels_are_the_mean_logits_of_the_experts_that_are_right() -> None:
    table = answers({0, 1, 2, 3, 4, 5}, {0, 1, 4, 5}, {1, 8}, seed=2)
    for count in (2, 3):
        found = Job(table[:count]).first_images(0)
        for i, row in zip(numbers_of(found), found.targets, strict=True):
            right = [e for e in range(count) if int(table[e, i].argmax()) == i % CLASSES] or list(range(count))
            torch.testing.assert_close(row, torch.stack([table[e, i] for e in right]).mean(0).softmax(0))


def test_no_expert_right_on_an_image_gives_the_mean_of_all() -> None:
    table = answers(set(), set())
    found = Job(table).first_images(0)
    assert found.targets.isfinite().all()
    for i, row in zip(numbers_of(found), found.targets, strict=True):
        torch.testing.assert_close(row, table[:, i].mean(0).softmax(0))


def test_labels_of_real_images_are_expert_0_s() -> None:
    table = answers({0, 1, 2}, set(range(12)))
    found = Job(table, init="real").first_images(0)
    torch.testing.assert_close(found.targets, table[0][numbers_of(found)].softmax(1))


def test_labels_that_are_not_learned_stay_hard() -> None:
    found = Job(answers({0, 1, 3, 4, 5, 8}, set()), soft=False).first_images(0)
    assert sorted(numbers_of(found)) == [0, 1, 3, 4, 5, 8] and torch.equal(found.targets, torch.eye(CLASSES)[OWNER])


def test_a_class_with_too_few_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="condense.ipc: 5, but a class has 4 images to start from: lower it"):
        Job(answers({0}, {1}), ipc=5).first_images(0)
