"""Every method in kd/train.py: terms, a learned temperature, a set that shrinks, assistants; how runs end and go on."""

import copy
import os
import re
import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from launching import ROOT
from PIL import Image
from safetensors.torch import load_file
from sklearn.neighbors import NearestNeighbors
from test_kd_programs import SHORT, TEACHER, Lab, difference, lines, numbers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from config import add_args_from_yaml
from kd import closing, teacher, train
from kd.kd_batches import Batch, Batches
from kd.kd_config import TERMS, VIEWS, Dataset, KdConfig
from kd.kd_data import KdData, load_kd_data
from kd.losses import distillation_loss
from kd.methods import contrast
from kd.methods.chains import kept_teachers
from kd.methods.contrast import ClassGaps
from kd.methods.rotations import HierarchicalHeads
from kd.methods.temperature import GlobalTemperature
from kd.methods.terms import DlbTerm, Pass
from kd.places import links, run_folder
from kd.shrinking import Shrinking
from kd.student_run import StudentRun
from kd.teacher import Teacher, teacher_file, teacher_files
from scripts import sweep
from utils.ddp import World, process_group
from utils.kd_networks import NETWORKS, kd_network
from utils.run_folder import RunFolder
from utils.streams import generator

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler", "ignore:CUDA is not available")
CONFIGS = ROOT / "config" / "kd"
SHARED = [name for name in TERMS if name not in VIEWS]  # terms of plain batches
CHAIN = ("DISTILLER.TYPE=KD", "ASSISTANTS.NETWORKS=[resnet14,resnet8]")
SMALL = ("CRD.NEGATIVES=40", "CRD.WIDTH=16", "BINGO.QUEUE=50")
STEPS = 4  # of an epoch: 60 samples by 16


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """60 samples, a teacher that has learned something; runs end without export, picture and page."""
    lab = Lab(tmp_path_factory.mktemp("methods"))
    short = yaml.safe_load(yaml.safe_dump(SHORT)) | {"M": [1, 2]}
    short["DATASET"] |= {"PER_CLASS": 6, "VAL_FRACTION": 0, "TEST": {"BATCH_SIZE": 300}}
    short["SOLVER"] |= {"LR": 0.01}
    lab.file.write_text(yaml.safe_dump(short))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("export_student", "loss_curve", "write_report"):
            patch.setattr(closing, name, lambda *_, **__: None)
        more = ("DATASET.PER_CLASS=40", "SOLVER.BATCH_SIZE=32", "SOLVER.EPOCHS=4", "SOLVER.LR=0.1")
        assert lab.within("teacher", *TEACHER, *more) == 0
        assert numbers(lab.only("teacher"))["top1"] > 50
        yield lab


class Begun(NamedTuple):
    """A run that a test walks through."""

    run: StudentRun
    batches: Batches
    teachers: list[Teacher]
    data: KdData

    def said(self, batch: Batch) -> list[Pass]:
        return [t.see(batch.of_teacher, [self.run.regions])[self.run.regions] for t in self.teachers]

    def step(self, turn: int) -> tuple[float, float]:
        """Cross-entropy and what the terms added."""
        before, batch = self.run.sums.clone(), self.batches.get(turn)
        self.run.step(batch, self.said(batch), turn)
        ce, extra, _, count, _ = (self.run.sums - before).tolist()
        return ce / count, extra / count

    def look(self, batch: Batch) -> Pass:
        """What the student says in the next step."""
        return copy.deepcopy(self.run.learner).train().look(batch.x)


@contextmanager
def begun(lab: Lab, save: str, *more: str, twice: bool = False) -> Iterator[Begun]:
    """The run as it begins or goes on; `twice`: taught by two of its teacher."""
    cfg = lab.config(*SMALL, *more, *lab.places(save))
    with process_group(torch.device("cpu")) as world:
        data = load_kd_data(cfg.DATASET)
        batches = Batches(data, cfg, world)
        found = teacher_files(cfg) * (1 + twice) if cfg.distils else []
        teachers = [Teacher(name, path, data, False, world.device) for name, path in found]
        if cfg.views == "bags":
            batches.neighbours = torch.arange(len(data.train))[:, None]
        folder = RunFolder(run_folder(cfg), {}, world)
        heads = teacher.teacher_heads(teacher_file(cfg)) if cfg.DISTILLER.TYPE == "HSAKD" else {}
        run = StudentRun(cfg, folder, data, batches, teachers, world, heads)
        batches.begin(batches.place(run.done)[0])
        yield Begun(run, batches, teachers, data)
        folder.end_log()


def statuses(*bodies: Callable[[], int]) -> list[int | None]:
    """Exit statuses of processes that start where this one is."""
    made = [get_context("fork").Process(target=lambda body=body: os._exit(body())) for body in bodies]
    for process in made:
        process.start()
    for process in made:
        process.join(300)
        process.kill()
    return [process.exitcode for process in made]


def ended(lab: Lab, save: str, number: int, steps: int, *more: str) -> int | None:
    """Exit status of a process to which a signal came after so many steps."""

    def body() -> int:
        old, taken = StudentRun.step, 0

        def step(*given: Any) -> None:
            nonlocal taken
            old(*given)
            taken += 1
            if taken == steps:
                os.kill(os.getpid(), number)

        pytest.MonkeyPatch().setattr(StudentRun, "step", step)  # of the fork alone
        return lab.within(save, *more)

    return statuses(body)[0]


def ranks(lab: Lab, save: str, *more: str) -> list[dict[str, Tensor]]:
    """What each of two ranks has in its learner at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def body(rank: int) -> int:
        number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in number.items()} | {"MASTER_ADDR": "127.0.0.1"})
        old = StudentRun.save

        def save_too(run: StudentRun) -> None:
            old(run)
            state = {k: v for k, v in run.learner.state_dict().items() if isinstance(v, Tensor)}
            torch.save(state, lab.folder / f"{save}_{rank}.pt")

        pytest.MonkeyPatch().setattr(StudentRun, "save", save_too)
        return lab.within(save, *more)

    assert statuses(lambda: body(0), lambda: body(1)) == [0, 0]
    return [torch.load(lab.folder / f"{save}_{rank}.pt") for rank in (0, 1)]


def spied(patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., Any]) -> list[Any]:
    """What is to be noted of all calls from now on."""
    found, old = [], getattr(owner, name)

    def call(*given: Any) -> Any:
        found.append(note(*given))
        return old(*given)

    patch.setattr(owner, name, call)
    return found


def method(name: str) -> str:
    return f"DISTILLER.TYPE={name}"


def state(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "state.pth", weights_only=True)["terms"]
    return found


# --- terms


def train_terms(lab: Lab) -> None:
    """All in one group, once: each alone, and with KD, by threes; the sum, the sum in bfloat16."""
    added = ["+".join(["KD", *SHARED[i : i + 3]]) for i in range(0, len(SHARED), 3)]
    every = "+".join(["SDD_KD_LSKD", *SHARED])
    runs = [*map(method, [*SHARED, *added, "KD+VID", every]), f"{method(every)} SOLVER.AMP=true"]
    assert lab.within("terms", *(f"--cfg={lab.file} {run}" for run in runs), *SMALL, "SOLVER.EPOCHS=1") == 0


def test_every_term_trains_alone_and_beside_kd_on_one_teacher_forward(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = spied(monkeypatch, Teacher, "see", lambda self, x, *_: len(x))
    train_terms(lab)
    assert sizes == [16, 16, 16, 12]
    folders = [path.parent for path in (lab.folder / "terms").rglob("result.json")]
    assert len(folders) == len(SHARED) + 7 == 19
    for folder in folders:
        assert all(np.isfinite(value) and line["train_kd"] for line in lines(folder) for value in line.values())
        assert {"agreement", "kl_to_teacher", "cka", "teacher_nll", "teacher_ece"} <= numbers(folder).keys()


@pytest.mark.parametrize("name", ["CRD", "REVIEWKD", "KD+VID"])
def test_a_term_in_a_group_ends_as_alone(lab: Lab, name: str) -> None:
    train_terms(lab)
    assert lab.within("terms_alone", method(name), *SMALL, "SOLVER.EPOCHS=1") == 0
    (label,) = (found for found in lab.runs("terms_alone") if found.startswith(f"{name}_"))
    one, other = lab.runs("terms")[label], lab.runs("terms_alone")[label]
    assert difference(one, other) <= 1e-5
    assert numbers(one) == pytest.approx(numbers(other), rel=1e-5)


def test_a_sum_of_terms_is_the_sum_of_their_values(lab: Lab) -> None:
    parts = ("KD", "AT", "RKD", "PKT")
    values = {}
    for name in (*parts, "+".join(parts)):
        with begun(lab, "sums", method(name)) as found:
            values[name] = found.step(0)[1]
    assert values["KD+AT+RKD+PKT"] == pytest.approx(sum(values[part] for part in parts), rel=1e-5)


def test_what_terms_learn_moves_and_the_teacher_stays(lab: Lab) -> None:
    with begun(lab, "moves", method("+".join(SHARED))) as found:
        before = {name: value.clone() for name, value in found.run.learner.named_parameters()}
        said = copy.deepcopy(found.teachers[0].net.state_dict())
        found.step(0)
        for name, value in found.run.learner.named_parameters():
            assert not value.equal(before[name]), name
        assert all(value.equal(said[name]) for name, value in found.teachers[0].net.state_dict().items())
        assert not any("teacher" in name for name in found.run.weights())


def test_a_loss_keeps_no_graph_after_its_step(lab: Lab) -> None:
    with begun(lab, "graphs", method("+".join(["KD", "DLB", *SHARED]))) as found:
        for turn in range(2):
            found.step(turn)
        for term in found.run.learner.terms.modules():
            for value in (*getattr(term, "news", ()), *(getattr(term, "last", None) or ())):
                assert value.grad_fn is None and not value.requires_grad


@pytest.mark.parametrize(
    "words",
    [
        "+".join(["SDD_KD_LSKD", "DLB", *SHARED]), "BINGO", "HSAKD", "HSAKD_TEACHER", "SDD_DKD KCD.PERIOD=1",
        "KD+DIST CTKD.INSTANCE=true", "TAT TAT.CELLS=2 TAT.GROUPS=2 TAT.ANCHOR=2",
    ],
)  # fmt: skip
def test_nothing_is_left_on_the_host_and_no_step_waits(lab: Lab, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values that claim to be of a GPU, where two devices in one operation are refused."""
    gpu = torch.device("cuda", 0)

    def moved(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], _: bool = True) -> torch.nn.Module:
        for child in module.children():
            moved(child, fn)
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else torch.nn.Parameter(fn(p.detach()), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else fn(b)
        return module

    monkeypatch.setattr(torch.nn.Module, "_apply", moved)
    monkeypatch.setattr(Tensor, "backward", lambda *_: None)  # whose threads want the device itself
    monkeypatch.setattr(teacher, "load_public", lambda *_: None)
    monkeypatch.setattr(teacher, "fuse", lambda block: block)
    monkeypatch.setattr(HierarchicalHeads, "load_state_dict", lambda *_: None)
    # Begin of a run: it may wait.
    monkeypatch.setattr(contrast, "class_gaps", lambda y: ClassGaps(y.argsort(), y[:10].clone(), y[:10].clone()))
    cfg = lab.config(*shlex.split(method(words)), *SMALL, *lab.places("gpu"))
    data = load_kd_data(cfg.DATASET)
    with process_group(torch.device("cpu")) as host:
        folder = RunFolder(run_folder(cfg), {}, host)
        with FakeTensorMode(allow_non_fake_inputs=True):
            world = World(0, 1, gpu)
            batches = Batches(data, cfg, world)
            batches.neighbours = torch.zeros(len(data.train), 5, dtype=torch.long)
            teachers = [Teacher("resnet14", Path(), data, False, gpu)] if cfg.distils else []
            found = Begun(StudentRun(cfg, folder, data, batches, teachers, world), batches, teachers, data)
            for epoch in (0, 1):
                batches.begin(epoch)
                batch = batches.get(0)
                found.run.step(batch, found.said(batch), 0)
                for term in found.run.learner.modules():
                    if isinstance(term, DlbTerm):  # as a checkpoint gives it
                        term.set_extra_state([x.to("cpu") for x in term.get_extra_state()])
            assert {x.device for x in found.run.learner.state_dict().values() if isinstance(x, Tensor)} == {gpu}
        folder.end_log()


# --- the learned temperature


@pytest.mark.parametrize("words", ["KD", "SDD_KD_LSKD M=[1,2]", "SDD_DKD"])
def test_temperature_climbs_by_the_slope_that_the_student_descends(lab: Lab, words: str) -> None:
    more = (*shlex.split(method(words)), "CTKD.START=4", "CTKD.EPOCHS=1", "DKD.WARMUP=0", "SOLVER.LR=1")
    with begun(lab, "climbs", *more) as found:
        policy, batch = found.run.learner.policy, found.batches.get(0)
        assert isinstance(policy, GlobalTemperature)
        student, said, cfg = found.look(batch), found.said(batch)[0], found.run.cfg

        def loss(temperature: float) -> float:
            settings = cfg.loss.model_copy(update={"temperature": temperature})
            s, t = student.regions.detach().double(), said.regions.double()
            return float(distillation_loss(s, t, batch.labels, settings))

        raw = policy.raw.item()
        found.step(0)
        slope = (loss(4.01) - loss(3.99)) / 0.02
        share = (4 - 1) / 20
        expected = cfg.SOLVER.LR * cfg.weights[1] * slope * 20 * share * (1 - share)
        assert policy.raw.item() - raw == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert abs(expected) > 1e-4


def test_temperature_rises_under_a_bad_student(lab: Lab) -> None:
    more = (method("KD"), "CTKD.START=4", "CTKD.EPOCHS=2", "SOLVER.EPOCHS=3", "SOLVER.LR_DECAY_STAGES=[9]")
    assert lab.within("rises", *more) == 0
    found = [4, *(line["temperature"] for line in lines(lab.only("rises")))]
    assert found == sorted(set(found))
    assert found[2] - found[1] > found[1] - found[0]  # the curriculum


@pytest.mark.parametrize("words", ["KD", "SDD_KD_LSKD", "KD CTKD.INSTANCE=true"])
def test_a_temperature_that_may_not_move_is_a_fixed_one(lab: Lab, words: str) -> None:
    name = re.sub(r"\W", "", words)
    assert lab.within(f"still_{name}", *shlex.split(method(words)), "CTKD.START=3", "CTKD.LAMBDA=0") == 0
    fixed = words.split()[0]
    assert lab.within(f"fixed_{fixed}", method(fixed), "KD.TEMPERATURE=3") == 0
    one, other = lab.only(f"still_{name}"), lab.only(f"fixed_{fixed}")
    assert difference(one, other) <= 1e-5
    assert [line["temperature"] for line in lines(one)] == pytest.approx([3, 3])


# --- a set that shrinks


def test_the_kept_are_worth_most_and_the_least_of_them_are_mixed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy, visits = np.zeros(60), np.zeros(60)
    note, end = Shrinking.note, Shrinking.end_epoch

    def noted(self: Shrinking, ids: Tensor, logits: Tensor) -> None:
        assert set(ids.tolist()) <= set(self.members.tolist())
        entropy[ids] += torch.distributions.Categorical(logits=logits.double()).entropy().numpy()
        visits[ids] += 1
        note(self, ids, logits)

    def epoch_ended(self: Shrinking, epochs: int) -> None:
        end(self, epochs)
        kept, images, given = 60 - 3 * epochs, self.images.images, self.original.images
        assert isinstance(images, Tensor) and isinstance(given, Tensor)
        order = np.argsort(-entropy / np.maximum(visits, 1) * visits**0.03)
        assert sorted(order[:kept]) == self.members.tolist()
        levels = given.double()
        for rank in range(3):
            least, left_out, share = order[kept - 3 + rank], order[kept + rank], 0.3 * rank / 3
            levels[least] = ((1 - share) * given[least].double() + share * given[left_out].double()).round()
        assert images.double().equal(levels) and not images.equal(given)

    monkeypatch.setattr(Shrinking, "note", noted)
    monkeypatch.setattr(Shrinking, "end_epoch", epoch_ended)
    assert lab.within("kept", method("KD"), "KCD.PERIOD=1", "SOLVER.EPOCHS=6") == 0
    assert visits.sum() == 60 + 57 + 54 + 51 + 48 + 45


def test_samples_shrink_as_scheduled_down_to_their_share(lab: Lab) -> None:
    assert lab.within("shrinks", method("KD"), "KCD.PERIOD=1", "SOLVER.EPOCHS=9") == 0
    found = lines(lab.only("shrinks"))
    assert [line["samples"] for line in found] == [60, 57, 54, 51, 48, 45, 42, 42, 42]
    used = [sum(min(16, n - i) for i in range(0, n, 16) if n - i > 1) for n in (60, 57, 54, 51, 48, 45, 42, 42, 42)]
    steps = np.diff([0, *(line["iteration"] for line in found)])
    assert steps.tolist() == [-(-n // 16) for n in used]


@pytest.mark.parametrize("name", ["NONE", "KD+DLB", "SDD_DKD+CRD"])
def test_any_method_trains_on_a_set_that_shrinks(lab: Lab, name: str) -> None:
    more = (method(name), "KCD.PERIOD=1", "KCD.STEPS=2", "KCD.SHARE=0.5", "SOLVER.EPOCHS=3", *SMALL)
    assert lab.within(f"shrinks_{name}", *more) == 0
    found = lines(lab.only(f"shrinks_{name}"))
    assert [line["samples"] for line in found] == [60, 45, 30]
    assert all(np.isfinite(value) for line in found for value in line.values())


# --- assistants


def test_a_chain_is_trained_from_large_to_small(lab: Lab) -> None:
    for dense in (True, False):
        cfg = lab.config(*CHAIN, f"ASSISTANTS.DENSE={dense}", *lab.places("chain"))
        chain = links(cfg)
        assert [link.DISTILLER.STUDENT for link in chain] == ["resnet14", "resnet8", "resnet8_sdd"]
        taught = [[path.parent.name for _, path in teacher_files(link)] for link in chain]
        made = ["resnet14_vanilla", *(run_folder(link).name for link in chain)]
        assert taught == [made[0 if dense else i : i + 1] for i in range(3)]
        alone = lab.config(method("KD"), "DISTILLER.STUDENT=resnet14", *lab.places("chain"))
        assert run_folder(chain[0]) == run_folder(alone)  # without assistants DGKD and TAKD are KD


def test_a_chain_killed_anywhere_goes_on_to_the_same_bits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.within("chain", *CHAIN) == 0
    first = 2 * STEPS - 2
    assert ended(lab, "broken", signal.SIGKILL, first, *CHAIN) == -signal.SIGKILL
    assert not lab.runs("broken")
    left = STEPS + 2 * STEPS  # of the assistants
    assert ended(lab, "broken", signal.SIGKILL, left + first, *CHAIN) == -signal.SIGKILL
    stamps = {path: path.stat().st_mtime_ns for path in (lab.folder / "broken").rglob("student.safetensors")}
    assert len(stamps) == 2
    steps = spied(monkeypatch, StudentRun, "step", lambda self, *_: self.label)
    assert lab.within("broken", *CHAIN) == 0
    assert len(steps) == STEPS and len(set(steps)) == 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    one, other = lab.runs("chain"), lab.runs("broken")
    assert len(one) == 3 and one.keys() == other.keys()
    for name in one:
        assert difference(one[name], other[name]) == 0
        assert numbers(one[name]) == numbers(other[name]) and lines(one[name]) == lines(other[name])


def test_a_student_of_takd_sees_the_last_assistant_only(lab: Lab) -> None:
    more = (*CHAIN, "ASSISTANTS.DENSE=false")
    assert lab.within("chain", *more) == 0  # whose first assistant is there
    cfg = lab.config(*more, *lab.places("chain"))
    last = links(cfg)[1]
    path = run_folder(last) / "student.safetensors"
    assert lab.within("of_last", method("KD"), "DISTILLER.TEACHER=resnet8", f"DISTILLER.TEACHER_PATH={path}") == 0
    assert difference(run_folder(cfg), lab.only("of_last")) == 0


def test_teachers_left_out_are_a_function_of_seed_and_step(lab: Lab) -> None:
    names = [name for name, _ in teacher_files(lab.config(*CHAIN, *lab.places("chain")))]
    assert names == ["resnet14_sdd", "resnet14", "resnet8"]
    assert lab.within("chain", *CHAIN) == 0
    with begun(lab, "chain", *CHAIN, "EXPERIMENT.NAME=drop") as found:
        masks = []
        for turn in range(STEPS):
            batch = found.batches.get(turn)
            own = found.look(batch).logits
            each = [kl(own, t.logits, 1.2) for t in found.said(batch)]
            mask = kept_teachers(3, 1, generator(0, "kd teachers", turn)).tolist()
            expected = 2 * sum(value for value, now in zip(each, mask, strict=True) if now)
            assert found.step(turn)[1] == pytest.approx(expected, rel=1e-4)
            masks.append(tuple(mask))
        assert {sum(mask) for mask in masks} == {2} and len(set(masks)) > 1


def test_what_has_no_teacher_counts_once_however_many_teachers(lab: Lab) -> None:
    with begun(lab, "once", method("KD+DLB"), twice=True) as found:
        assert sum(isinstance(term, DlbTerm) for term in found.run.learner.modules()) == 1
        found.step(0)
        batch = found.batches.get(1)
        own, said = found.look(batch).logits, found.said(batch)
        (last,) = (term.last for term in found.run.learner.modules() if isinstance(term, DlbTerm))
        assert last is not None
        kd = [kl(own, t.logits, found.run.cfg.KD.TEMPERATURE) for t in said]
        mask = kept_teachers(2, 1, generator(0, "kd teachers", 1)).tolist()
        expected = 2 * kd[mask.index(True)] + kl(own[16:], last.logits, 3.0)
        assert found.step(1)[1] == pytest.approx(expected, rel=1e-5)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """By torch."""
    s, t = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean").item()


# --- BINGO


def test_bags_are_the_teacher_s_and_keys_go_round(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spied(monkeypatch, train, "train_group", lambda runs, batches, *_: batches)
    assert lab.within("bingo", method("BINGO"), *SMALL) == 0
    batches: Batches = made[0]
    data = batches.data
    net = Teacher("resnet14", teacher_file(lab.config(*lab.places("bingo"))), data, False, torch.device("cpu"))
    with torch.no_grad():
        rows = net.net.get_feature_single(data.test_input(data.train, torch.arange(60), torch.device("cpu")))
    expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(rows.numpy()).kneighbors(return_distance=False)
    found = batches.neighbours
    assert found is not None and [set(row) for row in found.tolist()] == [set(row) for row in expected.tolist()]
    ring, place = np.zeros((50, 64)), 0
    for epoch in range(2):
        batches.begin(epoch)
        for turn in range(STEPS):
            batch = batches.get(turn)
            assert (found[batch.ids] == batches.member[batch.ids][:, None]).any(1).all()
            assert not batch.x[: batch.fresh].equal(batch.of_teacher)
            for row in F.normalize(net.see(batch.of_teacher, [((1,), "exact")])[(1,), "exact"].rows):
                ring[place % 50] = row.numpy()
                place += 1
    kept = state(lab.only("bingo"))
    assert int(kept["0.0.place"]) == 120 % 50
    np.testing.assert_allclose(kept["0.0.keys"].numpy(), ring, atol=1e-5)


def test_labels_are_read_for_the_head_only_which_is_the_best_linear_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.within("bingo", method("BINGO"), *SMALL) == 0

    def shuffled(d: Dataset) -> KdData:
        data = load_kd_data(d)
        data.train.targets.copy_(data.train.targets[torch.randperm(60, generator=generator(0, "test"))])
        return data

    monkeypatch.setattr(train, "load_kd_data", shuffled)
    assert lab.within("bingo_shuffled", method("BINGO"), *SMALL) == 0
    one, other = (load_file(lab.only(name) / "student.safetensors") for name in ("bingo", "bingo_shuffled"))
    assert all(value.equal(other[name]) != name.startswith("head") for name, value in one.items())
    assert numbers(lab.only("bingo"))["top1"] > numbers(lab.only("bingo_shuffled"))["top1"] + 10
    data = load_kd_data(lab.config().DATASET)
    net = kd_network("resnet8", 10, 1, 16, 0, "test")
    net.load_state_dict(one)
    with torch.no_grad():
        rows = net.eval().get_feature_single(data.test_input(data.train, torch.arange(60), torch.device("cpu")))
    weights = net.head.weight * rows.std(0, correction=0)  # of standardised features
    loss = F.cross_entropy(net.head(rows), data.train.labels) + 1e-4 / 2 * weights.square().sum()
    slopes = torch.autograd.grad(loss, list(net.head.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4


# --- DLB


def test_a_step_of_dlb_is_that_of_its_paper(lab: Lab) -> None:
    with begun(lab, "dlb", method("DLB")) as found:
        first = found.batches.get(0)
        last = found.look(first).logits
        ce, extra = found.step(0)
        assert extra == 0 and ce == pytest.approx(F.cross_entropy(last, first.labels).item(), rel=1e-5)
        second = found.batches.get(1)
        assert second.ids[16:].equal(first.ids) and second.labels[16:].equal(first.labels)
        assert not second.x[16:].equal(first.x)
        own = found.look(second).logits
        ce, extra = found.step(1)
        assert ce == pytest.approx(F.cross_entropy(own, second.labels).item(), rel=1e-5)
        assert extra == pytest.approx(kl(own[16:], last, 3.0), rel=1e-5)


def test_the_last_batch_survives_the_end_of_an_epoch(lab: Lab) -> None:
    assert lab.within("dlb", method("DLB")) == 0
    assert lines(lab.only("dlb"))[-1]["train_kd"] > 0
    with begun(lab, "dlb", method("DLB")) as found:
        assert found.run.done == 2 * STEPS
        found.batches.begin(1)
        before = found.batches.parts[-1]
        found.batches.begin(2)
        batch = found.batches.get(0)
        assert batch.ids[16:].equal(before) and len(before) == 12
        (term,) = (term for term in found.run.learner.modules() if isinstance(term, DlbTerm))
        assert term.last is not None and term.last.ids.equal(before)


def test_no_batch_comes_again_once_the_set_has_shrunk(lab: Lab) -> None:
    with begun(lab, "dlb_shrinks", method("DLB"), "KCD.PERIOD=1") as found:
        found.batches.begin(1)
        first, second = found.batches.get(0), found.batches.get(1)
        assert len(first.ids) == 16 and second.ids[16:].equal(first.ids)


# --- HSAKD


def train_heads(lab: Lab) -> Path:
    """HSAKD's first phase, once; the heads' file."""
    more = (method("HSAKD_TEACHER"), "DISTILLER.STUDENT=resnet14", "EXPERIMENT.SAVE_AS_TEACHER=true")
    assert lab.within("hsakd_teacher", *more) == 0
    return lab.folder / "save" / "digits" / "resnet14_hsakd" / "heads.safetensors"


def test_hsakd_in_two_phases(lab: Lab) -> None:
    heads = load_file(train_heads(lab))
    assert lab.within("hsakd", method("HSAKD")) == 0
    kept = state(lab.only("hsakd"))
    frozen = {name.removeprefix("0.0.frozen."): value for name, value in kept.items() if ".frozen." in name}
    assert frozen.keys() == heads.keys() and any("running_mean" in name for name in heads)
    assert all(value.equal(heads[name]) for name, value in frozen.items())
    assert numbers(lab.only("hsakd")).keys() >= {"agreement", "cka"}


def test_cross_entropy_of_hsakd_reads_upright_images_only(lab: Lab) -> None:
    train_heads(lab)
    for name in ("HSAKD", "HSAKD_TEACHER"):
        with begun(lab, f"upright_{name}", method(name)) as found:
            batch = found.batches.get(0)
            upright = found.batches.input(batch.ids)
            assert batch.x[0::4].equal(upright) and len(batch.x) == 4 * len(batch.labels)
            for turn in range(4):
                np.testing.assert_array_equal(batch.x[turn::4], np.rot90(upright.numpy(), turn, (2, 3)))
            logits = found.look(batch).logits
            expected = F.cross_entropy(logits[0::4], batch.labels).item()
            assert found.step(0)[0] == pytest.approx(expected, rel=1e-5)


# --- CRD


def test_crd_remembers_in_its_checkpoint_and_draws_other_classes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, scales = [], []
    draw, remember = contrast.crd_negatives, contrast.crd_remember

    def drawing(gaps: ClassGaps, labels: Tensor, *rest: Any) -> Tensor:
        drawn.append((labels, found := draw(gaps, labels, *rest)))
        return found

    def kept(memory: contrast.CrdMemory, *rest: Any) -> None:
        remember(memory, *rest)
        scales.append(memory.scale.clone())

    monkeypatch.setattr(contrast, "crd_negatives", drawing)
    monkeypatch.setattr(contrast, "crd_remember", kept)
    assert lab.within("crd", method("CRD"), *SMALL) == 0
    labels = load_kd_data(lab.config().DATASET).train.labels
    assert len(drawn) == len(scales) == 2 * STEPS
    assert all((labels[found] != own[:, None]).all() and found.shape[1] == 40 for own, found in drawn)
    assert not drawn[0][1].equal(drawn[1][1])
    assert scales[0].min() > 0 and all(scale.equal(scales[0]) for scale in scales)
    found = state(lab.only("crd"))
    assert found["0.0.scale"].equal(scales[0])
    for name in ("student", "teacher"):
        torch.testing.assert_close(found[f"0.0.{name}"].norm(dim=1), torch.ones(60))


# --- ends


@pytest.mark.parametrize(
    "words",
    ["KD+CRD+REVIEWKD CTKD.START=4", "KD+DLB KCD.PERIOD=1 CTKD.INSTANCE=true", "BINGO"],
)
def test_a_killed_and_a_stopped_run_go_on_to_the_same_bits(lab: Lab, words: str) -> None:
    more = (*shlex.split(method(words)), *SMALL, "SOLVER.EPOCHS=3")
    name = words.split()[0]
    assert lab.within(f"undisturbed_{name}", *more) == 0
    assert ended(lab, f"ended_{name}", signal.SIGKILL, STEPS + 2, *more) == -signal.SIGKILL
    assert ended(lab, f"ended_{name}", signal.SIGTERM, STEPS + 2, *more) == 128 + signal.SIGTERM
    (path,) = (lab.folder / f"ended_{name}").rglob("state.pth")
    assert torch.load(path, weights_only=True)["done"] == 2 * STEPS + 2
    assert lab.within(f"ended_{name}", *more) == 0
    one, other = lab.only(f"undisturbed_{name}"), lab.only(f"ended_{name}")
    assert difference(one, other) == 0 and numbers(one) == numbers(other) and lines(one) == lines(other)
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    assert all(value.equal(b[key]) for key, value in a.items() if isinstance(value, Tensor))


@pytest.mark.parametrize("words", ["KD CTKD.START=4", "KD+DLB", "KD KCD.PERIOD=2", "BINGO"])
def test_two_ranks_are_one_without_batch_norm(lab: Lab, words: str) -> None:
    """Batches of 13 in 7 and 6, the last of 8; BINGO's head is fitted to what was learned."""
    name, student = re.sub(r"\W", "", words), "DISTILLER.STUDENT=mini_students:group_norm"
    more = (*shlex.split(method(words)), student, "SOLVER.BATCH_SIZE=13", "SOLVER.EPOCHS=3", "SOLVER.LR=0.1", *SMALL)
    assert lab.within(f"rank_{name}", *more) == 0
    first, second = ranks(lab, f"ranks_{name}", *more)
    assert first.keys() == second.keys()
    assert all(value.equal(second[key]) for key, value in first.items())
    one, two = (load_file(lab.only(f"{save}_{name}") / "student.safetensors") for save in ("rank", "ranks"))
    for key, value in one.items():
        if "head" not in key or "BINGO" not in words:
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
    for a, b in zip(lines(lab.only(f"rank_{name}")), lines(lab.only(f"ranks_{name}")), strict=True):
        assert a["train_kd"] == pytest.approx(b["train_kd"], rel=1e-4)
        assert a["train_ce"] == pytest.approx(b["train_ce"], rel=1e-4)


@pytest.mark.parametrize(
    "words",
    ["+".join(["SDD_KD_LSKD", *SHARED]) + " CTKD.INSTANCE=true", "HSAKD", "CRD ASSISTANTS.NETWORKS=[resnet8]"],
)
def test_two_ranks_agree_on_all_that_they_learn_and_remember(lab: Lab, words: str) -> None:
    """Two of 60 samples are left over by batches of 29: no rank gets one alone, which batch norm refuses."""
    train_heads(lab)
    name = words.split()[0]
    first, second = ranks(lab, f"agree_{name}", *shlex.split(method(words)), *SMALL, "SOLVER.BATCH_SIZE=29")
    assert all(value.equal(second[key]) for key, value in first.items())
    for folder in lab.runs(f"agree_{name}").values():
        assert all(np.isfinite(value) for line in lines(folder) for value in line.values())


# --- fidelity, mistakes, shipped files


def test_a_student_is_its_own_faithful_copy(lab: Lab) -> None:
    with begun(lab, "itself", method("KD")) as found:
        run, data = found.run, found.data
        found.step(0)
        run.net.eval()
        with torch.no_grad():
            x = data.test_input(data.test, torch.arange(len(data.test)), torch.device("cpu"))
            said = closing.Said(run.net(x).logits, run.net.get_feature_single(x))
        result = closing.finish(run, said, [run])
    assert result["agreement"] == 100 and result["cka"] == pytest.approx(100)
    assert result["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert result["teacher_nll"] == pytest.approx(result["nll"], rel=1e-5)
    assert result["teacher_ece"] == pytest.approx(result["ece"], abs=1e-3)


@pytest.mark.parametrize(
    ("more", "parts", "status"),
    [
        ("DISTILLER.TYPE=KD+DKD", ["KD+DKD cannot be added up", "at most one"], 2),
        ("DISTILLER.TYPE=KD+KD", ["cannot be added up"], 2),
        ("DISTILLER.TYPE=KD+CTKD", ["CTKD is no TYPE", "CTKD.START=4"], 2),
        ("DISTILLER.TYPE=TAKD", ["TAKD is no TYPE", "ASSISTANTS.DENSE=false"], 2),
        ("DISTILLER.TYPE=KD+BINGO", ["BINGO", "alone"], 2),
        ("DISTILLER.TYPE=KD+REVIEWKDD", ["no method 'REVIEWKDD'", "did you mean 'REVIEWKD'?"], 2),
        ("DISTILLER.TYPE=CRD CTKD.START=4", ["CTKD: no temperature of CRD can be learned", "add KD"], 2),
        ("DISTILLER.TYPE=KD CTKD.START=40", ["START: 40", "set one"], 2),
        ("DISTILLER.TYPE=KD+AT KD.CACHE_VIEWS=2", ["KD.CACHE_VIEWS: 2", "set 0"], 2),
        ("DISTILLER.TYPE=KD KCD.SHARE=0.5 KD.CACHE_VIEWS=2", ["KD.CACHE_VIEWS: 2", "set 0"], 2),
        ("DISTILLER.TYPE=DLB ASSISTANTS.NETWORKS=[resnet8]", ["ASSISTANTS: DLB has no teacher"], 2),
        ("DISTILLER.TYPE=HSAKD ASSISTANTS.NETWORKS=[resnet8]", ["ASSISTANTS: HSAKD", "leave NETWORKS empty"], 2),
        ("DISTILLER.TYPE=AT DISTILLER.TEACHER=null", ["DISTILLER.TYPE: AT needs DISTILLER.TEACHER"], 2),
        ("DISTILLER.TYPE=BINGO BINGO.QUEUE=8", ["BINGO.QUEUE: 8", "a batch has 16"], 2),
        ("DISTILLER.TYPE=BINGO BINGO.BAG=60 BINGO.QUEUE=50", ["BINGO.BAG: 60 of 60 images"], 1),
        (
            "DISTILLER.TYPE=KD ASSISTANTS.NETWORKS=[resnet9]",
            ["ASSISTANTS.NETWORKS", "network 'resnet9' is not known"],
            2,
        ),
        ("DISTILLER.TYPE=HSAKD DISTILLER.TEACHER_PATH={teacher}", ["heads.safetensors", "HSAKD_TEACHER"], 1),
        ("DISTILLER.TYPE=HSAKD DISTILLER.TEACHER=resnet20", ["resnet20_hsakd", "DISTILLER.TYPE HSAKD_TEACHER"], 1),
        ("DISTILLER.TYPE=NONE KCD.PERIOD=1 {files}", ["KCD: it mixes images in memory", "IN_MEMORY: true"], 1),
        ("DISTILLER.TYPE=TAT TAT.CELLS=3 TAT.ANCHOR=2", ["3 x 3", "divisors"], 1),
        ("DISTILLER.TYPE=TAT TAT.CELLS=2", ["TAT.ANCHOR: 32", "pixels a side"], 1),
        ("DISTILLER.TYPE=TAT TAT.GROUPS=4", ["GROUPS: 4", "raise CELLS"], 2),
        ("DISTILLER.TYPE=FITNET FITNET.BLOCK=9", ["FITNET.BLOCK: 9", "have 3 levels"], 1),
        ("DISTILLER.TYPE=BINGO KCD.PERIOD=1", ["KCD: it ranks images by logits", "leave KCD out"], 2),
        ("DISTILLER.TYPE=HSAKD CTKD.START=4", ["CTKD: no temperature of HSAKD", "learned; leave CTKD out"], 2),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(
    lab: Lab, more: str, parts: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path / "mine" / part / kind for part in ("train", "val") for kind in "ab"):
        place.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(place / f"{number}.png")
    files = f"DATASET.TYPE=mine DATASET.ROOT={tmp_path} DATASET.IN_MEMORY=false DATASET.PER_CLASS=null"
    path = lab.folder / "save" / "digits" / "resnet14_vanilla" / "resnet14.safetensors"
    more = more.replace("{files}", files).replace("{teacher}", str(path))
    assert lab.within("mistakes", *shlex.split(more)) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(part in said.splitlines()[-1] for part in parts), said


@pytest.mark.parametrize("words", ["DLB", "KD KCD.PERIOD=1", "KD ASSISTANTS.NETWORKS=[resnet8]"])
def test_what_has_batches_or_teachers_of_its_own_shares_no_group(
    lab: Lab, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.within("mistakes", f"--cfg={lab.file}", f"--cfg={lab.file} {method(words)}") == 1
    assert "run it apart" in capsys.readouterr().err.splitlines()[-1]


def known(cfg: KdConfig) -> bool:
    d = cfg.DISTILLER
    names = [d.STUDENT, *cfg.ASSISTANTS.NETWORKS, *([d.TEACHER] if cfg.distils and d.TEACHER else [])]
    return all(name.removesuffix("_sdd") in NETWORKS for name in names)


def test_every_method_has_a_configuration_for_cifar_100() -> None:
    every = [add_args_from_yaml(KdConfig, path, (), ROOT).config for path in (CONFIGS / "cifar100/methods").glob("*")]
    assert all(known(cfg) and cfg.DATASET.TYPE == "cifar100" for cfg in every)
    assert {part for cfg in every for part in cfg.DISTILLER.parts} >= set(TERMS)
    assert any(cfg.CTKD for cfg in every) and any(cfg.KCD for cfg in every)
    assert {cfg.ASSISTANTS.DENSE for cfg in every if cfg.ASSISTANTS.NETWORKS} == {True, False}


@pytest.mark.parametrize("path", sorted((CONFIGS / "manifests").glob("*.txt")), ids=lambda path: path.stem)
def test_manifests_name_networks_that_exist(path: Path) -> None:
    runs = sweep.read_sweep(path, [0], [])
    assert runs and all(known(run.cfg) for run in runs)
    if path.stem.startswith("compare"):
        assert {part for run in runs for part in run.cfg.DISTILLER.parts} >= {*TERMS, "NONE", "KD", "SDD_KD_LSKD"}
        assert any(run.cfg.CTKD for run in runs) and any(run.cfg.KCD for run in runs)
        assert {run.cfg.ASSISTANTS.DENSE for run in runs if run.cfg.ASSISTANTS.NETWORKS} == {True, False}
