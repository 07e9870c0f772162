"""What every method compares comes closer on held-out digits: measured with numpy and scipy beside a plain student."""

from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.spatial.distance import cosine, pdist, squareform
from scipy.stats import entropy
from test_kd_method_runs import begun, method
from test_kd_programs import SHORT, Lab, lines, numbers
from torch import Tensor, nn

from kd import closing
from kd.kd_data import load_kd_data
from kd.methods.relations import Ickd
from kd.methods.terms import DistTerm, Seen
from kd.methods.transformer import HierarchicalTargetAware
from utils.kd_networks import kd_network

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
Array = NDArray[np.float64]
SEED, FIT, CPU = 2, 300, torch.device("cpu")
TEACHER = (
    "DISTILLER.TYPE=NONE", "SEED=0", "DISTILLER.STUDENT=resnet20", "EXPERIMENT.SAVE_AS_TEACHER=true",
    "DATASET.PER_CLASS=60", "SOLVER.BATCH_SIZE=32", "SOLVER.EPOCHS=6", "SOLVER.LR=0.1", "SOLVER.LR_DECAY_STAGES=[4]",
)  # fmt: skip
LONG = " SOLVER.EPOCHS=10 SOLVER.LR_DECAY_STAGES=[8]"  # what learns a projection of its own from nothing
RUNS = {
    **{name: name for name in ("NONE", "AT", "FITNET", "RKD", "SP", "NST", "DIST")}, "PKT": "PKT PKT.WEIGHT=10000",
    "VID": "VID VID.WEIGHT=10", "REVIEWKD": "REVIEWKD REVIEWKD.WEIGHT=3 REVIEWKD.WARMUP=1",
    "NONE long": "NONE" + LONG, "ICKD": "ICKD ICKD.WEIGHT=10" + LONG, "TAT": "TAT TAT.WEIGHT=2" + LONG,
}  # fmt: skip


class Says(NamedTuple):
    """A network's maps [N, C, H, W] of three stages, pooled rows [N, D] and softmax at temperature 4 [N, K]."""

    maps: list[Array]
    rows: Array
    odds: Array


class Group(NamedTuple):
    """Runs of one group on one teacher."""

    lab: Lab
    teacher: Says
    students: dict[str, Says]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    lab = Lab(tmp_path_factory.mktemp("mechanisms"))
    short = yaml.safe_load(yaml.safe_dump(SHORT))
    short["DATASET"] |= {"PER_CLASS": 40, "VAL_FRACTION": 0, "SIZE": 12, "TEST": {"BATCH_SIZE": 300}}
    short["DISTILLER"] = {"TYPE": "KD", "TEACHER": "resnet20", "STUDENT": "resnet8"}
    short["SOLVER"] = {"BATCH_SIZE": 16, "EPOCHS": 3, "LR": 0.05, "LR_DECAY_STAGES": [2]}
    lab.file.write_text(yaml.safe_dump(short | {"SEED": SEED}))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("export_student", "loss_curve", "write_report"):
            patch.setattr(closing, name, Mock())
        assert lab.within("teacher", *TEACHER) == 0
        assert numbers(lab.only("teacher"))["top1"] > 85
        words = (
            f"--cfg={lab.file} {method(more)} EXPERIMENT.NAME={name.replace(' ', '_')}" for name, more in RUNS.items()
        )
        assert lab.within("runs", *words) == 0
        data = load_kd_data(lab.config("DATASET.VAL_REST=true").DATASET)
        assert data.held_out
        x = torch.cat([data.test_input(p, torch.arange(n), CPU) for p, n in ((data.held_out, FIT), (data.test, 300))])

        def says(network: str, save: str, name: str) -> Says:
            net = kd_network(network, 10, 1, 12, 0, "test").eval()
            net.load_state_dict(load_file(lab.runs(save)[name] / "student.safetensors"))
            with torch.no_grad():
                maps = net.layers(x)
                rows = net.join(maps[-1])
                odds = (net.head(rows) / 4).softmax(1)
            return Says([m.double().numpy() for m in maps[1:]], rows.double().numpy(), odds.double().numpy())

        students = {
            name: says("resnet8", "runs", f"{name.replace(' ', '_')}{'' if 'NONE' in name else '_M1'}_seed{SEED}")
            for name in RUNS
        }
        yield Group(lab, says("resnet20", "teacher", "vanilla_resnet20_seed0"), students)


# --- what is compared, of a student and its teacher: less is closer


def unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def apart(a: Array, b: Array) -> float:
    """One less correlation."""
    return 1 - float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def on_tests(compare: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    return lambda s, t: compare(s[FIT:], t[FIT:])


def energy(s: Array, t: Array) -> float:
    a, b = (unit((x**2).mean(1).reshape(len(x), -1)) for x in (s, t))
    return float(np.linalg.norm(a - b, axis=1).mean())


def channel_directions(s: Array, t: Array) -> float:
    """Squared distance of the mean outer products [H W, H W] of unit channels."""
    a, b = (np.einsum("bcn,bcm->bnm", u, u) / u.shape[1] for u in (unit(x.reshape(*x.shape[:2], -1)) for x in (s, t)))
    return float(((a - b) ** 2).sum((1, 2)).mean())


def distances(s: Array, t: Array) -> float:
    return apart(pdist(s), pdist(t))


def neighbourhoods(s: Array, t: Array) -> float:
    """Divergence of neighbour probabilities, by cosines."""
    a, b = (2 - squareform(pdist(x, "cosine")) for x in (s, t))
    return float(entropy(b, a, axis=1).mean())


def similarities(s: Array, t: Array) -> float:
    a, b = (unit(x @ x.T) for x in (x.reshape(len(x), -1) for x in (s, t)))
    return float(np.linalg.norm(a - b))


def angles(s: Array, t: Array) -> float:
    """Cosines at the middle one of triplets."""
    triplets = np.random.default_rng(0).permuted(np.tile(np.arange(300), (3000, 1)), axis=1)[:, :3]
    a, b = (np.array([cosine(x[i] - x[j], x[k] - x[j]) for i, j, k in triplets]) for x in (s, t))
    return apart(a, b)


def odds_of_images(s: Array, t: Array) -> float:
    return float(np.mean([apart(a, b) for a, b in zip(s, t, strict=True)]))


def odds_of_classes(s: Array, t: Array) -> float:
    return odds_of_images(s.T, t.T)


def pixels(x: Array) -> Array:
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def unexplained(s: Array, t: Array) -> float:
    """Share of the teacher's variance that least squares on the student's pixel leave, fitted on other images."""
    a, b = np.c_[pixels(s), np.ones(len(pixels(s)))], pixels(t)
    cut = FIT * len(a) // len(s)
    rest = b[cut:] - a[cut:] @ np.linalg.lstsq(a[:cut].T @ a[:cut], a[:cut].T @ b[:cut], rcond=None)[0]
    return float((rest**2).sum() / ((b[cut:] - b[:cut].mean(0)) ** 2).sum())


def channel_correlations(s: Array, t: Array) -> float:
    """Squared distance of unit rows of F F^T, of the student's channels as Adam best projects them on other images."""
    a, b = (torch.from_numpy(x).float().flatten(2) for x in (np.insert(s, 0, 1, 1), t))

    def loss(weights: Tensor, part: slice) -> Tensor:
        g, h = (F.normalize(f @ f.mT, dim=2) for f in (weights @ a[part], b[part]))
        return (g - h).square().sum(2).mean()

    weights = torch.randn(t.shape[1], s.shape[1] + 1, generator=torch.Generator().manual_seed(0)).div(8)
    adam = torch.optim.Adam([weights.requires_grad_()], 0.02)
    for step in range(120):
        adam.zero_grad()
        loss(weights, slice(step % 4 * FIT // 4, (step % 4 + 1) * FIT // 4)).backward()
        adam.step()
    return loss(weights.detach(), slice(FIT, None)).item()


def asked(s: Tensor, t: Tensor, learned: dict[str, Tensor], place: str, training: bool) -> float:
    """Mean squared error of teacher maps, every pixel a mean of the student's by softmax of query . key, in loops."""

    def projected(name: str) -> Array:
        weight, gain, bias = (learned[f"{place}.{name}.{end}"] for end in ("0.weight", "1.weight", "1.bias"))
        mean, variance = (learned[f"{place}.{name}.1.running_{end}"].clone() for end in ("mean", "var"))
        x = F.batch_norm(F.conv2d(s, weight, padding=1), mean, variance, gain, bias, training)
        return x.flatten(2).double().numpy()

    total = 0.0
    for query, key, value in zip(t.flatten(2).double().numpy(), projected("key"), projected("value"), strict=True):
        for pixel in query.T:
            odds = np.exp(pixel @ key - (pixel @ key).max())
            total += ((value @ odds / odds.sum() - pixel) ** 2).sum()
    return total / t.numel()


Distance = Callable[[Array, Array], float]
# What a method compares, of which stages' maps or of what else, and the share of a plain student's that it leaves.
COMPARED: dict[str, tuple[Distance, tuple[int, ...] | str, float]] = {
    "AT": (on_tests(energy), (0, 1, 2), 0.8),
    "NST": (on_tests(channel_directions), (0, 1, 2), 0.5),
    "VID": (unexplained, (0, 1, 2), 0.95),
    "REVIEWKD": (unexplained, (0, 1, 2), 0.9),
    "FITNET": (unexplained, (1,), 0.8),
    "RKD distances": (on_tests(distances), "rows", 0.8),
    "RKD angles": (on_tests(angles), "rows", 0.9),
    "PKT": (on_tests(neighbourhoods), "rows", 0.9),
    "SP": (on_tests(similarities), (2,), 0.9),
    "DIST rows": (on_tests(odds_of_images), "odds", 0.9),
    "DIST columns": (on_tests(odds_of_classes), "odds", 0.9),
    "ICKD": (channel_correlations, (2,), 0.95),
    "TAT": (unexplained, (2,), 1),
}


@pytest.mark.parametrize("name", COMPARED)
def test_what_a_method_compares_comes_closer_to_the_teacher_s(group: Group, name: str) -> None:
    distance, parts, share = COMPARED[name]

    def to_teacher(run: str) -> float:
        own, said = group.students[run], group.teacher
        if isinstance(parts, str):
            return distance(getattr(own, parts), getattr(said, parts))
        return sum(distance(own.maps[stage], said.maps[stage]) for stage in parts)

    plain = "NONE long" if name in ("ICKD", "TAT") else "NONE"
    assert to_teacher(name.split()[0]) < share * to_teacher(plain)


def test_attention_of_tat_rebuilds_a_teacher_s_map_from_the_student_s_of_the_same_image(group: Group) -> None:
    path = group.lab.runs("runs")[f"TAT_M1_seed{SEED}"] / "state.pth"
    learned = torch.load(path, weights_only=True)["terms"]
    s, t = (torch.from_numpy(x.maps[2][FIT:]).float() for x in (group.students["TAT"], group.teacher))

    def left(s: Tensor) -> float:
        return asked(s, t, learned, "0.0.aware", False) / float(t.var((0, 2, 3)).mean())

    assert left(s) < 0.75 < left(s.roll(1, 0))


# --- values of steps


def test_weight_of_reviewkd_rises_by_equal_parts_to_its_own(group: Group) -> None:
    more = (method("REVIEWKD"), "REVIEWKD.WARMUP=4", "REVIEWKD.WEIGHT=3")
    with begun(group.lab, "warmup", *more, "SOLVER.EPOCHS=8") as found, torch.no_grad():
        batch = found.batches.get(0)
        said, run = found.said(batch), found.run.learner.train()
        loss, ce, extra, _ = (
            torch.stack(x) for x in zip(*(run(batch.x, batch, said, e, 0, 0) for e in range(1, 8)), strict=True)
        )
        (term,) = run.every[0]
        full = 3 * float(term(Seen(run.look(batch.x), said[0], batch.labels, batch.ids, batch.fresh, 0)))
        np.testing.assert_allclose(extra, full * np.array([0.25, 0.5, 0.75, 1, 1, 1, 1]), rtol=1e-4)
        torch.testing.assert_close(loss, ce + extra)
        assert ce.equal(ce[0].expand(7)) and full > 0.1


def test_a_step_of_ickd_on_a_grid_compares_channels_within_each_cell(group: Group) -> None:
    with begun(group.lab, "grid", method("ICKD"), "ICKD.GRID=2", "DATASET.SIZE=16") as found:
        batch = found.batches.get(0)
        learned = found.run.learner.terms.state_dict()
        own, said = found.look(batch).maps[-1].detach(), found.said(batch)[0].maps[-1]
        assert own.shape[2:] == said.shape[2:] == (4, 4)
        own = F.conv2d(own, learned["0.0.parts.0.0.weight"])
        own = F.batch_norm(own, None, None, learned["0.0.parts.0.1.weight"], learned["0.0.parts.0.1.bias"], True)
        s, t = (x.double().numpy() for x in (own, said))
        cells = [(slice(None), slice(None), slice(i, i + 2), slice(j, j + 2)) for i in (0, 2) for j in (0, 2)]
        total = 0.0
        for cell in cells:
            for a, b in zip(s[cell], t[cell], strict=True):
                g, h = (unit(x.reshape(64, 4) @ x.reshape(64, 4).T) for x in (a, b))
                total += ((g - h) ** 2).sum() / (len(cells) * len(s) * 64)
        values = [found.step(turn)[1] for turn in range(3)]
        assert values[0] == pytest.approx(Ickd().WEIGHT * total, rel=1e-4)
        assert np.isfinite(values).all() and min(values) > 0.1


def test_a_run_of_ickd_on_a_grid_ends(group: Group) -> None:
    more = ("ICKD.GRID=2", "DATASET.SIZE=16", "DATASET.PER_CLASS=8", "SOLVER.EPOCHS=1")
    assert group.lab.within("grid", method("ICKD"), *more) == 0
    (line,) = lines(group.lab.only("grid"))
    assert np.isfinite(line["train_kd"]) and line["train_kd"] > 0.1


@pytest.mark.parametrize(("count", "groups", "anchor"), [(2, 1, 4), (2, 4, 2), (4, 8, 2)])
def test_hierarchical_tat_asks_within_groups_of_patches_and_on_averaged_maps(
    count: int, groups: int, anchor: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, c, n, n, generator=draw, dtype=torch.float64) for c, n in ((3, 8), (4, 16)))
    net = HierarchicalTargetAware(3, 4, 3, count, groups, anchor).double()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        for part in (norm.weight, norm.bias):
            nn.init.normal_(part, generator=draw)

    def grouped(x: Tensor) -> Tensor:
        """Patches of an image row by row, the same number of them in a group, one behind the other on channels."""
        side, each = x.shape[2] // count, count**2 // groups
        corners = [(i * side, j * side) for i in range(count) for j in range(count)]
        parts = [corners[first : first + each] for first in range(0, count**2, each)]
        return torch.stack(
            [torch.cat([m[:, i : i + side, j : j + side] for i, j in part]) for m in x for part in parts]
        )

    learned = net.state_dict()
    local, whole = net(s, t)
    assert local.item() == pytest.approx(asked(grouped(s), grouped(t), learned, "local", True))
    a, b = (F.avg_pool2d(x, x.shape[2] // anchor) for x in (s, t))
    assert whole.item() == pytest.approx(asked(a, b, learned, "whole", True))


# --- several teachers


def test_a_student_of_dgkd_has_a_term_of_dist_for_either_teacher(group: Group) -> None:
    more = (method("DIST"), "ASSISTANTS.NETWORKS=[resnet14]", "ASSISTANTS.DROP=0", "DIST.WEIGHT=0.2", "SOLVER.EPOCHS=2")
    assert group.lab.within("dgkd", *more) == 0
    made = group.lab.runs("dgkd")
    assert len(made) == 2 and all(lines(folder)[-1]["train_kd"] > 0 for folder in made.values())
    with begun(group.lab, "dgkd", *more, "EXPERIMENT.NAME=again") as found:
        assert [[type(term) for term in terms] for terms in found.run.learner.every] == [[DistTerm], [DistTerm]]
        batch = found.batches.get(0)
        own = (found.look(batch).logits.detach() / 4).softmax(1).double().numpy()
        odds = [(said.logits / 4).softmax(1).double().numpy() for said in found.said(batch)]
        each = [0.2 * 16 * (odds_of_images(own, said) + odds_of_classes(own, said)) for said in odds]
        assert min(each) > 0.1 and abs(each[0] - each[1]) > 0.01
        assert found.step(0)[1] == pytest.approx(sum(each), rel=1e-2)
