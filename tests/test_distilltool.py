"""The toolkit's loops against hand-written ones, its save points against a simulation, its mistakes as single lines."""

import json
import random
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import start, wait
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, TensorDataset

import distilltool
import kd.distilltool
from config import ConfigError, Section, add_args_from_yaml
from distilltool import (
    MATCH_LOSS_MAP,
    BasicDistillation,
    BasicTraining,
    Distillation,
    DistillationConfig,
    HuggingFaceAdaptor,
    MultiTaskDistillation,
    MultiTeacherDistillation,
    TrainingConfig,
    expose_attentions,
    init_student_from_layers,
    save_points,
)
from kd.distilltool.multi_task import allot
from kd.distilltool.projections import attach_group, build_projection

ROOT = Path(__file__).resolve().parents[1]
V, L, C = 11, 5, 3


class Net(nn.Module):
    """Words -> logits [B, C], hidden states, attention scores, loss."""

    def __init__(self, depth: int, width: int, seed: int, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(V, width), nn.Linear(width, C)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.drop, self.calls = nn.Dropout(dropout), 0

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Any, ...]:
        self.calls += 1
        hidden, attention = [self.embed(ids)], []
        for layer in self.layers:
            attention.append((hidden[-1] @ hidden[-1].mT)[:, None])
            hidden.append(self.drop(layer(hidden[-1]).tanh()))
        pooled = (hidden[-1] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.head(pooled) * scale
        return logits, hidden, attention, nn.functional.cross_entropy(logits, labels)


def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
    mask = batch["mask"] if isinstance(batch, dict) else batch[1]
    return {"logits": (outputs[0],), "hidden": outputs[1], "attention": outputs[2], "losses": [outputs[3]],
            "inputs_mask": mask}  # fmt: skip


def rows(count: int = 20, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (count, L), generator=draw)
    mask = (torch.arange(L) < torch.randint(2, L + 1, (count, 1), generator=draw)).long()
    return [ids, mask, torch.randint(C, (count,), generator=draw)]


def loader(count: int = 20, size: int = 2, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(count)), batch_size=size, shuffle=shuffle)


def settings(folder: Path, **more: Any) -> TrainingConfig:
    return TrainingConfig(**{"log_dir": None, "output_dir": folder, "device": "cpu"} | more)


def sgd(net: nn.Module, lr: float = 0.1) -> SGD:
    return SGD(net.parameters(), lr=lr, momentum=0.9)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


def saved(folder: Path) -> list[int]:
    return sorted(int(path.stem[2:]) for path in folder.glob("gs*.pkl"))


def ce(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    return -((t / temperature).softmax(-1) * (s / temperature).log_softmax(-1)).sum(-1).mean()


def hidden(loss: str = "hidden_mse", layer_S: Any = 1, layer_T: Any = 2, **more: Any) -> dict[str, Any]:
    return {"layer_T": layer_T, "layer_S": layer_S, "feature": "hidden", "loss": loss, "weight": 1.0} | more


# names


def test_the_short_name_gives_the_same_objects() -> None:
    assert distilltool.__all__ == kd.distilltool.__all__
    for name in distilltool.__all__:
        assert getattr(distilltool, name) is getattr(kd.distilltool, name)
    assert distilltool.DistillConfig is DistillationConfig and distilltool.TrainConfig is TrainingConfig
    assert distilltool.BasicMultiTeacherDistillation is MultiTeacherDistillation
    assert [path.name for path in sorted((ROOT / "distilltool").glob("*.py"))] == ["__init__.py", "presets.py"]


def test_the_short_name_gives_the_same_objects_to_a_script_in_kd(tmp_path: Path) -> None:
    (tmp_path / "distilltool").symlink_to(ROOT / "kd" / "distilltool")  # beside the script, as in kd/
    script = tmp_path / "program.py"
    script.write_text(
        "import distilltool, distilltool.presets as short, kd.distilltool as home, kd.distilltool.presets as presets\n"
        f"assert distilltool.__file__.startswith({str(tmp_path)!r})\n"
        "assert all(getattr(distilltool, n) is getattr(home, n) for n in home.__all__)\n"
        "assert all(getattr(short, n) is getattr(presets, n) is getattr(home, n) for n in presets.__all__)\n"
    )
    wait(start([sys.executable, script], tmp_path))


def test_the_quick_start_of_the_requirement_runs_by_its_keywords(tmp_path: Path) -> None:
    model_T, model_S, steps = Net(12, 6, 2), Net(3, 4, 1), list[int]()
    optimizer = sgd(model_S)
    distillator = Distillation(
        train_config=TrainingConfig(log_dir=str(tmp_path / "log"), output_dir=str(tmp_path), device="cpu"),
        distill_config=distilltool.DistillConfig(
            temperature=8,
            intermediate_matches=[hidden(layer_T=4 * i, layer_S=i, proj=["linear", 4, 6]) for i in range(4)],
        ),
        model_T=model_T, model_S=model_S, adaptor_T=adaptor, adaptor_S=adaptor,
    )  # fmt: skip
    with distillator:
        distillator.train(optimizer=optimizer, scheduler=schedules.StepLR(optimizer, 5), dataloader=loader(),
                          num_train_epochs=2, callback=lambda model, step: steps.append(step), scale=0.5)  # fmt: skip
    with distillator:
        distillator.train(optimizer, None, loader(), 1, None)
    assert steps == saved(tmp_path) == [10, 20] and len(optimizer.param_groups) == 5


# settings


def test_every_way_to_write_settings_gives_the_same(tmp_path: Path) -> None:
    given = {"temperature": 8, "intermediate_matches": [hidden(proj=["linear", 4, 6, {"lr": 0.5}])]}
    before = json.dumps(given)
    (tmp_path / "a.json").write_text(before)
    (tmp_path / "a.yaml").write_text(before)
    built = DistillationConfig(**given)
    assert DistillationConfig.from_dict(given) == DistillationConfig(**built.model_dump()) == built
    assert DistillationConfig.from_json_file(tmp_path / "a.json") == built
    assert DistillationConfig.from_yaml(tmp_path / "a.yaml") == built
    assert json.dumps(given) == before
    defaults = DistillationConfig()
    assert (defaults.temperature, defaults.hard_label_weight, defaults.kd_loss_weight) == (4, 0, 1)
    assert (defaults.kd_loss_type, defaults.intermediate_matches) == ("ce", None)
    train = TrainingConfig()
    assert (train.gradient_accumulation_steps, train.ckpt_frequency, train.ckpt_epoch_frequency) == (1, 1, 1)
    assert (train.log_dir, train.output_dir, train.device) == ("./logs", "./saved_models", "cuda")
    assert TrainingConfig(device=torch.device("cpu")).device == "cpu"
    long = DistillationConfig(intermediate_matches=[hidden(proj=["linear_projection", 4, 6])])
    assert long.intermediate_matches and long.intermediate_matches[0].proj == ("linear", 4, 6, None)


@pytest.mark.parametrize(("given", "said"), [
    ({"temprature": 4}, "temprature: unknown key; did you mean 'temperature'"),
    ({"temperature": 0}, "temperature: 0 should be greater than 0"),
    ({"kd_loss_type": "cee"}, "kd_loss_type: 'cee' is not a logit loss; known: ce, mse, bce; did you mean 'ce'"),
    ({"intermediate_matches": [hidden("hiden_mse")]}, r"\[0\].loss: 'hiden_mse' .* did you mean 'hidden_mse'"),
    ({"intermediate_matches": [hidden() | {"feature": "hiden"}]}, r"\[0\].feature: 'hiden' .* 'hidden'"),
    ({"intermediate_matches": [hidden("mmd")]}, "layer_T: 2, but mmd compares pairs"),
    ({"intermediate_matches": [hidden(layer_T=[1, 2])]}, r"layer_T: \[1, 2\], but hidden_mse takes one layer"),
    ({"intermediate_matches": [hidden(proj=["lin", 4, 6])]}, "'lin' is not a projection; known: linear"),
    ({"intermediate_matches": [hidden(proj=["linear", 4])]}, "dim_S and dim_T are needed"),
    ({"intermediate_matches": [{k: v for k, v in hidden().items() if k != "weight"}]}, "weight: required"),
])  # fmt: skip
def test_a_wrong_setting_is_one_line_with_its_key(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(given))
    for build in (lambda: DistillationConfig(**given), lambda: DistillationConfig.from_json_file(tmp_path / "a.json"),
                  lambda: DistillationConfig.from_yaml(tmp_path / "a.json")):  # fmt: skip
        with pytest.raises(ConfigError, match=said) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_settings_can_be_sections_of_a_program_s_own(tmp_path: Path) -> None:
    class Root(Section):
        train: TrainingConfig = TrainingConfig()
        distill: DistillationConfig

    path = tmp_path / "a.yaml"
    path.write_text(
        "train: {device: cpu}\ndistill:\n  temperature: 8\n  intermediate_matches:\n  - " + json.dumps(hidden())
    )
    found = add_args_from_yaml(Root, path, ["distill.temperature=2"], tmp_path).config
    assert found.distill == DistillationConfig(temperature=2, intermediate_matches=[hidden()])
    with pytest.raises(ConfigError, match="distill.temprature: unknown key; did you mean"):
        add_args_from_yaml(Root, path, ["distill.temprature=2"], tmp_path)
    with pytest.raises(ConfigError, match="temperature: -1 should be greater than 0") as caught:
        add_args_from_yaml(Root, path, ["distill.temperature=-1"], tmp_path)
    assert "\n" not in str(caught.value)


# save points


def simulated(n: int, a: int, f: int, e: int, epochs: int) -> list[int]:
    """Walk through every batch; a save when another f-th of a counted epoch's steps is complete, and at the end."""
    step, saves, per_epoch = 0, [], len([i for i in range(n) if i % a == 0])
    for epoch in range(1, epochs + 1):
        waiting, within, passed = 0, 0, 0
        for batch in range(1, n + 1):
            waiting += 1
            if waiting == a or batch == n:
                waiting, within, step = 0, within + 1, step + 1
                # the i-th of f parts ends at the last whole step that is not beyond i / f of the epoch
                crossed = sum(1 for i in range(1, f + 1) if within * f <= i * per_epoch < (within + 1) * f)
                passed += crossed
                if epoch % e == 0 and crossed:
                    saves.append(step)
    return saves if saves and saves[-1] == step else [*saves, step]


@pytest.mark.parametrize(("a", "f", "e", "epochs", "expected"), [
    (1, 1, 1, 3, [10, 20, 30]),
    (1, 2, 1, 3, [5, 10, 15, 20, 25, 30]),
    (1, 1, 2, 3, [20, 30]),
    (1, 2, 2, 4, [15, 20, 35, 40]),
    (1, 2, 2, 3, [15, 20, 30]),
    (3, 2, 1, 2, [2, 4, 6, 8]),
    (11, 1, 1, 2, [1, 2]),
    (1, 20, 1, 1, list(range(1, 11))),
])  # fmt: skip
def test_weights_are_saved_where_the_rule_says(
    a: int, f: int, e: int, epochs: int, expected: list[int], tmp_path: Path
) -> None:
    assert save_points(10, a, f, e, epochs) == expected == simulated(10, a, f, e, epochs)
    net, steps = Net(1, 2, 0), list[int]()
    config = settings(tmp_path, gradient_accumulation_steps=a, ckpt_frequency=f, ckpt_epoch_frequency=e)
    BasicTraining(config, net, adaptor).train(sgd(net), None, loader(), epochs, lambda model, step: steps.append(step))
    assert steps == saved(tmp_path) == expected
    assert config.total_steps(10, epochs) == expected[-1]


def test_save_points_are_those_of_a_walk_through_the_batches() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        n, a, f, e, epochs = (draw.randint(1, top) for top in (40, 12, 25, 5, 7))
        assert save_points(n, a, f, e, epochs) == simulated(n, a, f, e, epochs), (n, a, f, e, epochs)


# the loop


def by_hand(student: Net, teacher: Net, batches: list[list[Tensor]], epochs: int, a: int) -> Tensor:
    """Accumulated distillation at T = 3 plus half the hard loss, written out."""
    optimizer = sgd(student)
    for _ in range(epochs):
        for first in range(0, len(batches), a):
            group = batches[first : first + a]
            optimizer.zero_grad()
            for batch in group:
                with torch.no_grad():
                    target = teacher(*batch)[0]
                out = student(*batch)
                ((ce(out[0], target, 3.0) + 0.5 * out[3]) / len(group)).backward()
            optimizer.step()
    return weights(student)


@pytest.mark.parametrize("a", [1, 3, 11])
def test_training_is_the_loop_written_by_hand_and_no_batch_is_lost(a: int, tmp_path: Path) -> None:
    expected = by_hand(Net(1, 4, 1), Net(2, 6, 2), list(loader()), 2, a)
    for kind in (BasicDistillation, Distillation):
        student = Net(1, 4, 1)
        config = settings(tmp_path, gradient_accumulation_steps=a)
        with kind(config, DistillationConfig(temperature=3, hard_label_weight=0.5), Net(2, 6, 2), student, adaptor,
                  adaptor) as distiller:  # fmt: skip
            assert isinstance(distiller, kind)
            distiller.train(sgd(student), None, loader(), num_train_epochs=2)
        torch.testing.assert_close(weights(student), expected)


Named = namedtuple("Named", ["ids", "mask", "labels"])


@pytest.mark.parametrize("form", [tuple, list, lambda b: Named(*b), lambda b: dict(zip(Named._fields, b, strict=True)),
                                  lambda b: UserDict(zip(Named._fields, b, strict=True))])  # fmt: skip
def test_batches_of_every_form_train_alike(form: Callable[[Any], Any], tmp_path: Path) -> None:
    student = Net(1, 4, 1)
    BasicDistillation(
        settings(tmp_path), DistillationConfig(temperature=3, hard_label_weight=0.5), Net(2, 6, 2), student, adaptor,
        adaptor,
    ).train(sgd(student), None, [form(b) for b in loader()], 1)  # fmt: skip
    torch.testing.assert_close(weights(student), by_hand(Net(1, 4, 1), Net(2, 6, 2), list(loader()), 1, 1))


def test_teacher_and_student_can_have_batches_of_their_own(tmp_path: Path) -> None:
    student, teacher, seen = Net(1, 4, 1), Net(2, 6, 2), list[Any]()
    batches = [{"teacher": b, "student": [b[0].flip(1), b[1].flip(1), b[2]]} for b in loader()]
    BasicDistillation(settings(tmp_path), DistillationConfig(), teacher, student,
                      lambda b, out: seen.append(b) or {"logits": out[0]}, lambda b, out: {"logits": out[0]},
                      ).train(sgd(student), None, batches, 1)  # fmt: skip
    assert torch.equal(seen[0][0], batches[0]["teacher"][0])


def test_further_arguments_go_to_both_models_and_misspelt_ones_do_not(tmp_path: Path) -> None:
    one, other, distillers = Net(1, 4, 1), Net(1, 4, 1), []
    for student in (one, other):
        distillers.append(BasicDistillation(settings(tmp_path), DistillationConfig(), Net(2, 6, 2), student, adaptor,
                                            adaptor))  # fmt: skip
    distillers[0].train(sgd(one), None, loader(), 1)
    distillers[1].train(sgd(other), None, loader(), 1, scale=2.0)
    assert not torch.equal(weights(one), weights(other))
    for name in ("schduler", "call_back", "num_epoch"):
        with pytest.raises(TypeError, match="did you mean"):
            distillers[0].train(sgd(one), None, loader(), 1, **{name: None})


def test_the_callback_gets_a_saved_model_and_disturbs_nothing(tmp_path: Path) -> None:
    found = []

    def look(model: nn.Module, step: int) -> str:
        torch.testing.assert_close(torch.load(tmp_path / f"gs{step}.pkl"), model.state_dict())
        model.eval()
        torch.rand(step)
        return "not looked at"

    for callback in (look, None):
        student = Net(1, 4, 1, dropout=0.3)
        torch.manual_seed(5)
        BasicTraining(settings(tmp_path, ckpt_frequency=5), student, adaptor).train(
            sgd(student), None, loader(shuffle=True), 2, callback
        )
        found.append(weights(student))
    assert torch.equal(*found)


def test_modes_are_those_of_before_also_after_an_exception(tmp_path: Path) -> None:
    student, teacher = Net(2, 4, 1), Net(2, 6, 2)
    student.eval()
    student.layers[1].train()
    before = [m.training for m in (*student.modules(), *teacher.modules())]
    distiller = Distillation(settings(tmp_path), DistillationConfig(), teacher, student, adaptor, adaptor)

    def fail(model: nn.Module, step: int) -> None:
        assert not any(m.training for m in teacher.modules()) and all(m.training for m in student.modules())
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        distiller.train(sgd(student), None, loader(), 1, fail)
    assert [m.training for m in (*student.modules(), *teacher.modules())] == before
    with pytest.raises(RuntimeError), distiller as same:
        assert same is distiller and not teacher.training and student.layers[0].training
        raise RuntimeError
    assert [m.training for m in (*student.modules(), *teacher.modules())] == before
    assert all(p.grad is None for p in teacher.parameters())


def endless(count: int | None = None) -> Iterator[Any]:
    number = 0
    while count is None or number < count:
        yield rows(2, number)
        number += 1


def test_a_loader_of_unknown_length_trains_a_number_of_steps(tmp_path: Path) -> None:
    net = Net(1, 4, 1)
    trainer = BasicTraining(settings(tmp_path, ckpt_frequency=3, gradient_accumulation_steps=2), net, adaptor)
    trainer.train(sgd(net), None, endless(), num_steps=7)
    assert saved(tmp_path) == [2, 4, 7]
    trainer.train(sgd(net), None, loader(), num_steps=7)  # begins again after its 10 batches
    for given, said in (({"num_epochs": 1}, "give num_steps"), ({}, "give one of them"),
                        ({"num_steps": 9}, "ended in step 4 of 9")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            trainer.train(sgd(net), None, endless(5), **given)  # type: ignore[arg-type]


def test_the_start_is_reported_and_every_step_logged(tmp_path: Path) -> None:
    student = Net(1, 4, 1)
    config = DistillationConfig(hard_label_weight=1, intermediate_matches=[hidden(proj=["linear", 4, 6]),
                                                                           hidden("mmd", [0, 1], [1, 2])])  # fmt: skip
    distiller = Distillation(settings(tmp_path, log_dir=tmp_path), config, Net(2, 6, 2), student, adaptor, adaptor)
    distiller.train(sgd(student), None, loader(), 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for name in ("ce logits, T 4", "losses", "hidden_mse hidden 2>1", "mmd hidden 1,2>0,1"):
        assert f"{lines[0][name]:.4g}" in next(row for row in distiller.report.splitlines() if row.startswith(name))
    assert lines[0]["total"] == pytest.approx(sum(lines[0][n] for n in lines[0].keys() - {"step", "total", "lr"}))
    assert "[2, 5, 4] to 6" in distiller.report and "[2, 5, 6]" in distiller.report
    config = DistillationConfig(hard_label_weight=1)
    silent = BasicDistillation(
        settings(tmp_path), config, Net(2, 6, 2), student, adaptor, lambda b, o: {"logits": o[0]}
    )
    silent.train(sgd(student), None, loader(), 1)
    assert "hard_label_weight has no effect" in silent.report


# terms


def first_values(config: DistillationConfig, folder: Path, **more: Any) -> dict[str, Tensor]:
    distiller = Distillation(settings(folder), config, Net(2, 6, 2), Net(1, 6, 1), adaptor, adaptor, **more)
    return {term.name: term.value.detach() for term in distiller.terms(next(iter(loader())), {})}


def test_every_loss_works_as_a_match(tmp_path: Path) -> None:
    matches = [hidden(n) for n in ("hidden_mse", "cos", "pkd")]
    matches += [hidden(n, [0, 1], [0, 2]) for n in ("gram", "mmd")]
    matches += [hidden(n, -1, -1) | {"feature": "attention"} for n in MATCH_LOSS_MAP if n.startswith("attention")]
    found = first_values(DistillationConfig(kd_loss_weight=0, intermediate_matches=matches), tmp_path)
    assert len(found) == 9 and all(value.isfinite() and value > 0 for value in found.values())


def test_a_custom_match_is_the_match_of_the_same_features_and_leaves_no_hook(tmp_path: Path) -> None:
    student, teacher, batch = Net(1, 6, 1), Net(2, 6, 2), next(iter(loader()))
    custom: list[dict[str, Any]] = [
        {"module_T": "layers.1", "module_S": student.layers[0], "loss": "hidden_mse", "weight": 2.0},
        {"module_T": ["layers.0", "layers.1"], "module_S": ["layers.0", "layers.0"], "loss": "mmd", "weight": 1.0},
        {"module_T": "head", "module_S": "head", "loss": lambda s, t, mask: (s - t).abs().mean(), "weight": 1.0,
         "proj": nn.Linear(3, 3), "select": lambda x: x * 0},
        {"module_T": "head", "module_S": "head", "loss": "cos", "weight": 1.0},
    ]  # fmt: skip
    distiller = Distillation(settings(tmp_path), DistillationConfig(), teacher, student, adaptor, adaptor, custom)
    values = {term.name: term.value for term in distiller.terms(batch, {})}
    s, t = (
        student.layers[0](student.embed(batch[0])),
        teacher.layers[1](teacher.layers[0](teacher.embed(batch[0])).tanh()),
    )
    torch.testing.assert_close(
        values["hidden_mse layers.1>layers.0"], MATCH_LOSS_MAP["hidden_mse"](s, t, mask=batch[1])
    )
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    optimizer = sgd(student)
    distiller.train(optimizer, None, loader(), 1)
    assert len(optimizer.param_groups) == 2
    for key, value, said in (("module_T", "layer.1", "did you mean 'layers.1'"), ("loss", "mse", "not a match loss"),
                             ("module_S", teacher.head, "not in the model"), ("wight", 1, "unknown key")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            Distillation(settings(tmp_path), DistillationConfig(), teacher, student, adaptor, adaptor,
                         [custom[0] | {key: value}])  # fmt: skip


@pytest.mark.parametrize(("given", "said"), [
    ([{"module_T": "layer.1"}], "module_T: no module 'layer.1'; did you mean 'layers.1'"),
    ([{"wieght": 1}], "'wieght': unknown key.*did you mean 'weight'"),
    ([{"weight": "much"}], "weight: 'much' is not a number"),
    ([{"loss": "hiden_mse"}], "'hiden_mse' is not a match loss.*did you mean 'hidden_mse'"),
    ([{"proj": "linear"}], "a name, dim_S and dim_T are needed"),
    ([{"loss": "mmd"}], "mmd layers.1>layers.0: mmd: student: a list of two matrices"),
    ("layers.1", "str, not a dict with keys of module_T"),
])  # fmt: skip
def test_a_wrong_custom_match_is_one_line(given: Any, said: str, tmp_path: Path) -> None:
    whole = {"module_T": "layers.1", "module_S": "layers.0", "loss": "cos", "weight": 1.0}
    matches, student = [x if isinstance(x, str) else whole | x for x in given], Net(1, 4, 1)
    with pytest.raises(ConfigError, match=said):
        Distillation(
            settings(tmp_path), DistillationConfig(), Net(2, 6, 2), student, adaptor, adaptor, custom_matches=matches
        ).train(sgd(student), None, loader(), 1)


def test_an_own_loss_needs_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATCH_LOSS_MAP, "mine", lambda s, t, mask=None: (s - t).abs().mean())
    assert (
        float(first_values(DistillationConfig(intermediate_matches=[hidden("mine")]), tmp_path)["mine hidden 2>1"]) > 0
    )


def logit_value(student: Any, teacher: Any, folder: Path, **more: Any) -> float:
    """The logit loss for what adaptors return."""
    net = Net(1, 4, 1)
    config = DistillationConfig(temperature=2, **more)
    distiller = BasicDistillation(settings(folder), config, net, net, lambda b, o: teacher, lambda b, o: student)
    return float(distiller.terms(next(iter(loader())), {})[0].value)


def test_logits_can_be_lists_and_lose_positions(tmp_path: Path) -> None:
    s, t = (torch.randn(2, 4, L, C, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    mask = torch.tensor([[1, 1, 0, 1, 0]]).repeat(4, 1)
    kept = [0, 1, 3]
    both = float(sum(ce(s[i][:, kept], t[i][:, kept], 2) for i in range(2)))
    spoilt = [x.masked_fill(mask[..., None] == 0, float("nan")) for x in s]
    for masks in (mask, [mask], [mask, mask]):
        found = logit_value({"logits": spoilt, "logits_mask": masks}, {"logits": tuple(t)}, tmp_path)
        assert found == pytest.approx(both, rel=1e-5)
    one = {"logits": s[0], "logits_mask": mask}
    assert logit_value(one, {"logits": t[0]}, tmp_path) == pytest.approx(float(ce(s[0][:, kept], t[0][:, kept], 2)))
    assert logit_value({"logits": s[0], "logits_mask": mask * 0}, {"logits": t[0]}, tmp_path) == 0
    flat = {"logits": s[0, :, 0], "logits_mask": mask}  # 2-D: no positions to leave out
    assert logit_value(flat, {"logits": t[0, :, 0]}, tmp_path) == pytest.approx(float(ce(s[0, :, 0], t[0, :, 0], 2)))


@pytest.mark.parametrize(("teacher", "student", "matches", "said"), [
    ({"logits": torch.zeros(2, 4)}, {"logits": torch.zeros(2, 3)}, [], r"'logits': student \[2, 3\], teacher \[2, 4\]"),
    ({}, {"logits": torch.zeros(2, 3)}, [], "'logits': student .*, teacher none"),
    ({}, {}, [], "nothing to train on"),
    ({}, {"logit": 1}, [], "adaptor_S: 'logit' is not an adaptor key.*did you mean 'logits'"),
    ({}, [1], [], "adaptor_S: returned list"),
    ({}, {"logits": [torch.zeros(2, 3)] * 3, "logits_mask": [torch.zeros(2, 3)] * 2}, [], "has 2 masks, 'logits' 3"),
    ({"hidden": [torch.zeros(2, L, 4)] * 3}, {}, [hidden()], "adaptor_S: no key 'hidden'"),
    ({"hidden": [torch.zeros(2, L, 4)] * 2}, {}, [hidden()], "adaptor_T: 'hidden' has 2 entries, there is no layer 2"),
    ({"attention": ()}, {}, [hidden() | {"feature": "attention"}], "'attention' is empty.*attn_implementation='eager'"),
    ({"hidden": [torch.zeros(2, L, 6)] * 3}, {"hidden": [torch.zeros(2, L, 4)] * 3}, [hidden()],
     "hidden_mse hidden 2>1: .*add proj"),
    ({"hidden": [torch.zeros(2, L, 6)] * 3}, {"hidden": [torch.zeros(2, L, 4)] * 3}, [hidden(proj=["linear", 5, 6])],
     "proj takes width 5"),
    ({"hidden": [torch.zeros(2, 3)] * 3, "inputs_mask": torch.ones(2, 3)},
     {"hidden": [torch.zeros(2, 3)] * 3, "inputs_mask": torch.ones(2, 4)}, [hidden()], "'inputs_mask': student"),
])  # fmt: skip
def test_a_wrong_adaptor_is_one_line_with_the_key(
    teacher: Any, student: Any, matches: Any, said: str, tmp_path: Path
) -> None:
    config, net = DistillationConfig(intermediate_matches=matches), Net(1, 4, 1)
    distiller = Distillation(settings(tmp_path), config, Net(1, 4, 2), net, lambda b, o: teacher, lambda b, o: student)
    with pytest.raises(ConfigError, match=said) as caught:
        distiller.train(sgd(net), None, loader(), 1)
    assert "\n" not in str(caught.value)


def test_further_mistakes_are_one_line(tmp_path: Path) -> None:
    net, config, matches = Net(1, 4, 1), settings(tmp_path), DistillationConfig(intermediate_matches=[hidden()])
    plain = DistillationConfig()
    with pytest.raises(ConfigError, match="BasicDistillation has none"):
        BasicDistillation(config, matches, net, net, adaptor, adaptor)
    with pytest.raises(ConfigError, match="BasicMultiTeacherDistillation has none"):
        MultiTeacherDistillation(config, matches, [net], net, adaptor, adaptor)
    with pytest.raises(ConfigError, match="give a list"):
        MultiTeacherDistillation(config, plain, net, net, adaptor, adaptor)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="MultiTaskDistillation has none"):
        MultiTaskDistillation(config, matches, {"a": net}, net, {"a": adaptor}, {"a": adaptor})
    with pytest.raises(ConfigError, match="adaptor_S: .'b'.*give a dict by task"):
        MultiTaskDistillation(config, plain, {"a": net}, net, {"a": adaptor}, {"b": adaptor})
    with pytest.raises(ConfigError, match="no key 'losses'"):
        BasicTraining(config, net, lambda b, o: {"logits": o[0]}).train(sgd(net), None, loader(), 1)
    with pytest.raises(ConfigError, match="no batches"):
        BasicTraining(config, net, adaptor).train(sgd(net), None, [], 1)
    for epochs in (0, 1.5):
        with pytest.raises(ConfigError, match="a whole number from 1"):
            BasicTraining(config, net, adaptor).train(sgd(net), None, loader(), epochs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="optimizer: has no parameter of the trained model"):
        BasicTraining(config, net, adaptor).train(sgd(Net(1, 4, 1)), None, loader(), 1)
    with pytest.raises(ConfigError, match="train_config: DistillationConfig, not a TrainingConfig"):
        BasicDistillation(plain, config, net, net, adaptor, adaptor)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="distill_config: dict, not a DistillationConfig; .*from_dict"):
        Distillation(config, {"temperature": 8}, net, net, adaptor, adaptor)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="proj: 'lrr' is no option of SGD; did you mean 'lr'"):
        mistyped = DistillationConfig(intermediate_matches=[hidden(proj=["linear", 4, 4, {"lrr": 1}])])
        Distillation(config, mistyped, net, net, adaptor, adaptor).train(sgd(net), None, loader(), 1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="log_dir: .*file: .*None for no log"):
        BasicTraining(settings(tmp_path, log_dir=tmp_path / "file"), net, adaptor).train(sgd(net), None, loader(), 1)
    with pytest.raises(ConfigError, match="is on meta"):
        BasicTraining(config, Net(1, 4, 1).to("meta"), adaptor).train(sgd(net), None, loader(), 1)


def test_a_run_without_cuda_goes_on_with_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BasicTraining(TrainingConfig(), Net(1, 4, 1), adaptor).device.type == "cpu"
    assert caplog.text.count("the CPU is used") == 1


# several teachers


def test_teachers_of_one_task_are_averaged_over_their_logits(tmp_path: Path) -> None:
    teachers, student, batch = [Net(2, 6, i) for i in (2, 3)], Net(1, 4, 1), next(iter(loader()))
    distiller = MultiTeacherDistillation(settings(tmp_path), DistillationConfig(), teachers, student, adaptor, adaptor)
    mean = torch.stack([t(*batch)[0] for t in teachers]).mean(0)
    torch.testing.assert_close(distiller.terms(batch, {})[0].value, ce(student(*batch)[0], mean, 4))
    distiller.train(sgd(student), None, loader(), 1)
    assert all(t.training for t in teachers)
    other = lambda b, out: {"logits": out[0][:, :2]}  # noqa: E731
    with pytest.raises(ConfigError, match=r"model_T\[1\] are \[2, 2\], of model_T\[0\] \[2, 3\]"):
        MultiTeacherDistillation(settings(tmp_path), DistillationConfig(), teachers, student, [adaptor, other], adaptor,
                                 ).train(sgd(student), None, loader(), 1)  # fmt: skip


def test_tasks_share_a_student_and_every_batch_comes_once(tmp_path: Path) -> None:
    teachers = {"a": Net(2, 6, 2), "b": Net(2, 6, 3)}
    loaders = {"a": loader(12), "b": loader(6)}
    student, seen = Net(1, 4, 1), list[tuple[str, Tensor]]()

    def watched(task: str) -> Callable[[Any, Any], dict[str, Any]]:
        return lambda batch, out: seen.append((task, batch[0])) or {"logits": out[0]}

    distiller = MultiTaskDistillation(
        settings(tmp_path), DistillationConfig(), teachers, student, {t: adaptor for t in teachers},
        {t: watched(t) for t in teachers},
    )  # fmt: skip
    distiller.train(sgd(student), None, loaders, 2)
    for first in (0, 9):
        for task, batches in loaders.items():
            mine = [ids for name, ids in seen[first : first + 9] if name == task]
            assert all(torch.equal(x, b[0]) for x, b in zip(mine, batches, strict=True))
    assert [name for name, _ in seen[:9]] != [name for name, _ in seen[9:]] and saved(tmp_path) == [9, 18]
    assert (teachers["a"].calls, teachers["b"].calls) == (12, 6)
    assert all(f"{task}: ce logits" in distiller.report for task in teachers)
    with pytest.raises(ConfigError, match="dataloader: .'a'.*but the tasks are"):
        distiller.train(sgd(student), None, {"a": loader()}, 1)


def test_tau_moves_shares_from_proportional_to_equal() -> None:
    assert allot([90, 10], 1.0) == [90, 10] and allot([90, 10], 0.0) == [50, 50]
    shares = [w / (90**0.5 + 10**0.5) * 100 for w in (90**0.5, 10**0.5)]
    assert all(abs(found - share) < 1 for found, share in zip(allot([90, 10], 0.5), shares, strict=True))
    assert sum(allot([7, 5, 3], 0.3)) == 15


# projections and schedules

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8, 2.0),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.1, 0.5, 3, base_momentum=0.7),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.5, 20),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, threshold=1e9),
    "SWALR": lambda o: SWALR(o, 0.01, 3),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.CosineAnnealingLR(o, 6)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.5, 1.0, 3), schedules.ExponentialLR(o, 0.9)], o
    ),
}


def test_every_schedule_of_torch_is_tried() -> None:
    assert set(schedules.__all__) - {"LRScheduler"} <= SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_late_group_has_the_rates_of_one_that_was_there_from_the_start(name: str) -> None:
    def rates(late: bool, lr: float | None) -> list[tuple[float, ...]]:
        one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        options = {} if lr is None else {"lr": lr}
        optimizer = SGD(one.parameters(), lr=0.1, momentum=0.9)
        if not late:
            optimizer.add_param_group({"params": list(other.parameters()), **options})
        scheduler = SCHEDULES[name](optimizer)
        if late:
            attach_group(optimizer, scheduler, other.parameters(), options)
        found = []
        for _ in range(9):
            found.append(tuple(float(g[key]) for g in optimizer.param_groups for key in ("lr", "momentum")))
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return found

    assert rates(True, None) == [pytest.approx(row) for row in rates(False, None)]
    if name in ("CyclicLR", "OneCycleLR"):  # these overwrite what a group says: its share of the default is kept
        assert all(second == pytest.approx(2 * first) for first, _, second, _ in rates(True, 0.2))
    elif name != "SWALR":  # every group gets the one swa_lr
        assert rates(True, 0.7) == [pytest.approx(row) for row in rates(False, 0.7)]


@pytest.mark.parametrize("name", [*SCHEDULES, "a function", "none"])
def test_projections_train_in_a_group_of_their_own_under_every_schedule(name: str, tmp_path: Path) -> None:
    student = Net(1, 4, 1)
    matches = [hidden(proj=["linear", 4, 6]), hidden("cos", proj=["linear", 4, 6, {"lr": 0.7, "weight_decay": 0.1}]),
               hidden("gram", [0, 1], [0, 2], proj=["linear", 4, 6])]  # fmt: skip
    config = DistillationConfig(intermediate_matches=matches)
    distiller = Distillation(settings(tmp_path), config, Net(2, 6, 2), student, adaptor, adaptor)
    before = [weights(module) for module, _ in distiller.extra]
    optimizer = sgd(student)
    scheduler = {"a function": SCHEDULES["StepLR"], "none": None}.get(name) or (
        SCHEDULES[name](optimizer) if name in SCHEDULES else None
    )
    distiller.train(optimizer, scheduler, loader(), 1)
    assert len(optimizer.param_groups) == 4
    assert all(not torch.equal(weights(module), old) for (module, _), old in zip(distiller.extra, before, strict=True))
    assert (optimizer.param_groups[1]["weight_decay"], optimizer.param_groups[2]["weight_decay"]) == (0, 0.1)
    if name in ("none", "StepLR", "a function"):
        factor = 1 if name == "none" else 1e-3  # 10 steps of StepLR by 3
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([x * factor for x in (0.1, 0.1, 0.7, 0.1)])
    distiller.train(optimizer, None, loader(), 1)
    assert len(optimizer.param_groups) == 4
    assert saved(tmp_path) == [10] and len(torch.load(tmp_path / "gs10.pkl")) == len(student.state_dict())


def test_a_projection_is_drawn_from_torch_s_seed_without_moving_its_stream() -> None:
    torch.manual_seed(3)
    one, after = build_projection("linear", 300, 400, 0), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(weights(build_projection("linear", 300, 400, 0)), weights(one))
    weight, bias = one.parameters()
    assert abs(float(weight.detach().std()) - 0.02) < 2e-4 and not bias.any()


# a teacher that is asked once, runs that go on, precision


def indexed(count: int = 20) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count), *rows(count)), batch_size=2, shuffle=True)


def test_a_cached_teacher_is_asked_once_and_says_the_same(tmp_path: Path) -> None:
    found = []
    for cache in (0, None):
        student, teacher = Net(1, 4, 1), Net(2, 6, 2)
        config = DistillationConfig(intermediate_matches=[hidden(proj=["linear", 4, 6])], cache_teacher=cache)
        torch.manual_seed(0)
        batches: Any = indexed()
        if cache is None:
            batches = [batch[1:] for _ in range(3) for batch in indexed()]
        Distillation(settings(tmp_path), config, teacher, student, adaptor, adaptor).train(
            sgd(student), None, batches, 1 if cache is None else 3
        )
        found.append(weights(student))
        assert teacher.calls == 30 if cache is None else teacher.calls < 30
    torch.testing.assert_close(*found)


def test_a_cache_goes_by_index_and_not_by_order(tmp_path: Path) -> None:
    student, teacher, data = Net(1, 4, 1), Net(2, 6, 2), rows(4)
    distiller = BasicDistillation(settings(tmp_path), DistillationConfig(cache_teacher="row"), teacher, student,
                                  adaptor, adaptor)  # fmt: skip

    def batch(*numbers: int) -> dict[str, Tensor]:
        which = torch.tensor(numbers)
        return {"row": which} | dict(zip(Named._fields, (x[which] for x in data), strict=True))

    with distiller:
        first = distiller.terms(batch(0, 1, 2, 3), {})[0].value
        calls = teacher.calls
        again = [distiller.terms(batch(*pair), {})[0].value for pair in ((3, 0), (1, 2))]
    assert teacher.calls == calls
    torch.testing.assert_close(torch.stack(again).mean(), first)
    with pytest.raises(ConfigError, match="cache_teacher: 'row' is not where"):
        distiller.terms({"ids": data[0]}, {})


class Stop(Exception):
    pass


@pytest.mark.parametrize(("name", "at"), [*((name, 6) for name in SCHEDULES), ("StepLR", 10), ("StepLR", 16)])
def test_a_stopped_run_goes_on_to_the_same_weights(name: str, at: int, tmp_path: Path) -> None:
    def run(folder: Path, stop: int, resume: bool) -> Tensor:
        torch.manual_seed(99 if resume else 7)
        student = Net(1, 4, 1, dropout=0.3)
        config = DistillationConfig(intermediate_matches=[hidden(proj=["linear", 4, 6])])
        distiller = Distillation(settings(folder, ckpt_frequency=5, resume=resume), config, Net(2, 6, 2), student,
                                 adaptor, adaptor)  # fmt: skip
        optimizer = sgd(student, 0.05)

        def callback(model: nn.Module, step: int) -> None:
            if step == stop:
                raise Stop

        distiller.train(optimizer, SCHEDULES[name](optimizer), loader(shuffle=True), 2, callback)
        return weights(student)

    whole = run(tmp_path / "whole", 0, False)
    with pytest.raises(Stop):
        run(tmp_path / "parts", at, False)
    assert torch.equal(run(tmp_path / "parts", 0, True), whole)
    assert torch.equal(run(tmp_path / "parts", 0, True), whole)  # finished: nothing is left to train


def test_a_run_that_goes_on_logs_every_step_once(tmp_path: Path) -> None:
    def late(model: nn.Module, step: int) -> None:
        if step == 16:
            raise Stop

    for resume, callback in ((False, late), (True, None)):
        net = Net(1, 4, 1)
        config = settings(tmp_path, ckpt_frequency=5, resume=resume, log_dir=tmp_path)
        trainer = BasicTraining(config, net, adaptor)
        if callback:
            with pytest.raises(Stop):
                trainer.train(sgd(net), None, loader(), 2, callback)
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 17}\n')  # as where the process went on and was lost
        else:
            trainer.train(sgd(net), None, loader(), 2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_another_plan_does_not_go_on_from_here(tmp_path: Path) -> None:
    proj = [hidden(proj=["linear", 4, 6])]

    def train(
        depth: int = 1, matches: Any = proj, make: Callable[[nn.Module], Optimizer] = sgd, scheduler: Any = None,
        a: int = 1, resume: bool = True,
    ) -> None:  # fmt: skip
        net, config = Net(depth, 4, 1), DistillationConfig(intermediate_matches=matches)
        train_config = settings(tmp_path, resume=resume, gradient_accumulation_steps=a)
        Distillation(train_config, config, Net(2, 6, 2), net, adaptor, adaptor).train(make(net), scheduler, loader(), 1)

    train(resume=False)
    train()
    for other, said in (
        ({"a": 2}, "epochs of 10 steps, here 5"),
        ({"make": lambda net: AdamW(net.parameters())}, "optimizer was SGD, here AdamW"),
        ({"scheduler": lambda optimizer: schedules.StepLR(optimizer, 2)}, "scheduler was NoneType, here StepLR"),
        ({"matches": []}, "projections does not fit .*set resume=False"),
        ({"depth": 2}, "student does not fit .*layers.1.weight"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            train(**other)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_half_precision_is_of_the_networks_only(amp: str, tmp_path: Path) -> None:
    student, kinds = Net(1, 4, 1), list[torch.dtype]()
    start_weights = weights(student)

    def watched(batch: Any, out: Any) -> dict[str, Any]:
        kinds.append(out[0].dtype)
        return adaptor(batch, out)

    config = DistillationConfig(intermediate_matches=[hidden(proj=["linear", 4, 6]), hidden("mmd", [0, 1], [0, 2])])
    distiller = Distillation(settings(tmp_path, amp=amp), config, Net(2, 6, 2), student, adaptor, watched)
    optimizer = AdamW(student.parameters())
    distiller.train(optimizer, schedules.StepLR(optimizer, 3), loader(), 1)
    assert set(kinds) == {getattr(torch, amp)} and not torch.equal(weights(student), start_weights)
    assert all(term.value.dtype == torch.float32 for term in distiller.terms(next(iter(loader())), {}))
    assert weights(student).dtype == torch.float32 and weights(student).isfinite().all()


# wrapped students


def test_a_wrapped_student_is_saved_without_its_wrapper_and_vector_losses_are_averaged(tmp_path: Path) -> None:
    student = Net(1, 4, 1)
    wrapped = nn.DataParallel(student)

    def twice(batch: Any, out: Any) -> dict[str, Any]:
        return {"losses": [torch.stack([out[3], 3 * out[3]])]}

    trainer = BasicTraining(settings(tmp_path), wrapped, twice)
    value = trainer.terms(next(iter(loader())), {})[0].value
    torch.testing.assert_close(value, 2 * student(*next(iter(loader())))[3])
    trainer.train(sgd(student), None, loader(), 1)
    assert torch.load(tmp_path / "gs10.pkl").keys() == student.state_dict().keys()


RANKS = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_distilltool import *
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=int(sys.argv[1]), world_size=2)
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
student = Net(1, 4, 1)
wrapped = nn.parallel.DistributedDataParallel(student)
config = DistillationConfig(intermediate_matches=[hidden(proj=["linear", 4, 6]), hidden("pkd", proj=["linear", 4, 6])])
distiller = Distillation(settings(Path({folder!r}), gradient_accumulation_steps=2), config, Net(2, 6, 2), wrapped,
                         adaptor, adaptor)
share = [[x[rank::size] for x in batch] for batch in loader(20, 4)]
for module, _ in distiller.extra:
    torch.nn.init.constant_(module.weight, 0.1 if rank == 0 else 5.0)
steps = []
distiller.train(sgd(student), None, share, 1, lambda model, step: steps.append(step))
assert steps == [3]
mine = torch.cat([weights(student), *(weights(m) for m, _ in distiller.extra)])
both = [torch.empty_like(mine) for _ in range(size)]
dist.all_gather(both, mine)
assert torch.equal(both[0], both[1])
if rank == 0:
    torch.save({{"student": weights(student), "all": mine}}, {out!r})
dist.destroy_process_group()
"""


def test_two_ranks_train_like_one_on_the_joined_batches(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(ROOT / "tests"), folder=str(tmp_path), out=str(tmp_path / "out.pt")))
    for rank in [start([sys.executable, script, str(number)]) for number in range(2)]:
        wait(rank)
    student = Net(1, 4, 1)
    config = DistillationConfig(
        intermediate_matches=[hidden(proj=["linear", 4, 6]), hidden("pkd", proj=["linear", 4, 6])]
    )
    distiller = Distillation(settings(tmp_path / "one", gradient_accumulation_steps=4), config, Net(2, 6, 2), student,
                             adaptor, adaptor)  # fmt: skip
    for module, _ in distiller.extra:
        nn.init.constant_(module.weight, 0.1)  # type: ignore[arg-type]
    halves = [[x[rank::2] for x in batch] for batch in loader(20, 4) for rank in (0, 1)]
    distiller.train(sgd(student), None, halves, 1)  # the mean over a rank's micro-batches, then over ranks
    mine = torch.cat([weights(student), *(weights(m) for m, _ in distiller.extra)])
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")["all"], mine)


# a student that starts from its teacher; models of transformers


def test_a_student_starts_as_the_chosen_layers_of_its_teacher() -> None:
    teacher, student = Net(4, 6, 1), Net(2, 6, 2)
    assert init_student_from_layers(teacher, student, [1, -1]) == []
    assert torch.equal(weights(student.layers[0]), weights(teacher.layers[1]))
    assert torch.equal(weights(student.layers[1]), weights(teacher.layers[3]))
    assert torch.equal(student.embed.weight, teacher.embed.weight)
    wide = Net(4, 6, 1)
    wide.head = nn.Linear(6, 9)
    assert init_student_from_layers(wide, Net(2, 6, 2), [0, 2]) == ["head.weight", "head.bias"]
    for layers, said in (
        ([0, 1, 2], "are 3, but the student has layers of 2"),
        ([0, 4], "4, but layers of the teacher"),
    ):
        with pytest.raises(ConfigError, match=said):
            init_student_from_layers(teacher, student, layers)
    with pytest.raises(ConfigError, match=r"layers.0.weight: \[4, 4\], but the teacher's layers.0.weight is \[6, 6\]"):
        init_student_from_layers(teacher, Net(2, 4, 2), [0, 2])


def bert(kind: str, layers: int, attention: str = "sdpa", dropout: float = 0.1, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, attention_probs_dropout_prob=dropout, attn_implementation=attention, **more,
    )  # fmt: skip
    torch.manual_seed(layers)
    return getattr(transformers, kind)(config)


def words(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [1] * 7])
    return {"input_ids": ids, "attention_mask": mask} | more


SHOW = {"output_attentions": True, "output_hidden_states": True}


def test_attentions_of_transformers_are_exposed_or_refused_in_one_line(tmp_path: Path) -> None:
    teacher, student = (bert("BertForSequenceClassification", n, num_labels=3) for n in (4, 2))
    config = DistillationConfig(hard_label_weight=1, intermediate_matches=[
        hidden("attention_ce", 1, 3) | {"feature": "attention"}, hidden("cos", 2, 4), hidden("mmd", [0, 1], [0, 2]),
    ])  # fmt: skip
    batches = [words(labels=torch.tensor([0, 1, 2, 0]))]

    def train() -> None:
        adapt = HuggingFaceAdaptor("log")
        distiller = Distillation(settings(tmp_path), config, teacher, student, adapt, adapt)
        distiller.train(AdamW(student.parameters()), None, batches, 2, **SHOW)

    with pytest.raises(ConfigError, match="attentions: the model gives none.*expose_attentions"):
        train()
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="as after dropout.*expose_attentions"):
        train()
    names = expose_attentions(student)
    assert names == [f"bert.encoder.layer.{i}.attention.self.dropout" for i in range(2)]
    expose_attentions(teacher)
    train()
    with pytest.raises(ConfigError, match="not a model of transformers"):
        expose_attentions(Net(1, 2, 0))


def test_attention_ce_of_the_adaptor_is_the_cross_entropy_of_the_attentions() -> None:
    batch, adapt = words(), HuggingFaceAdaptor("log")
    models = [bert("BertForSequenceClassification", n, "eager", 0.0).double().eval() for n in (2, 3)]
    outs = [model(**batch, **SHOW) for model in models]
    s, t = (adapt(batch, out) for out in outs)
    found = MATCH_LOSS_MAP["attention_ce"](s["attention"][1], t["attention"][2], mask=batch["attention_mask"])
    p, q = outs[1].attentions[2], outs[0].attentions[1]
    rows_of = -(p * q.clamp_min(1e-300).log()).sum(-1)  # [B, H, L]
    keep = batch["attention_mask"][:, None].expand_as(rows_of) == 1
    torch.testing.assert_close(found, rows_of[keep].mean(), rtol=1e-9, atol=1e-12)


def test_spans_and_tokens_of_transformers_are_distilled_without_their_padding(tmp_path: Path) -> None:
    labels = torch.full((4, 7), -100)
    labels[:, 1:3] = 1
    for kind, batch in (("BertForQuestionAnswering", words()), ("BertForTokenClassification", words(labels=labels))):
        teacher, student = bert(kind, 3).eval(), bert(kind, 2)
        left = init_student_from_layers(teacher, student, [0, 2])
        assert left == []
        distiller = BasicDistillation(settings(tmp_path), DistillationConfig(), teacher, student.eval(),
                                      HuggingFaceAdaptor(), HuggingFaceAdaptor())  # fmt: skip
        found, mask = distiller.terms(batch, {})[0].value, batch["attention_mask"]
        with torch.no_grad():
            s, t = student(**batch), teacher(**batch)
        if "labels" in batch:
            expected = ce(s.logits[labels != -100], t.logits[labels != -100], 4)
        else:
            pairs = ((s.start_logits, t.start_logits), (s.end_logits, t.end_logits))
            expected = sum(
                torch.stack([ce(x[i, : mask[i].sum()], y[i, : mask[i].sum()], 4) for i in range(4)]).mean()
                for x, y in pairs
            )  # type: ignore[assignment]
        torch.testing.assert_close(found, expected)
        distiller.train(AdamW(student.parameters()), None, [batch], 1)


def test_textbrewer_trains_to_the_same_weights(tmp_path: Path) -> None:
    theirs = pytest.importorskip("textbrewer")
    matches = [hidden(), hidden("cos", 0, 0), hidden("gram", [0, 1], [0, 2])]
    found = []
    for ours in (True, False):
        student, teacher = Net(1, 6, 1), Net(2, 6, 2)
        if ours:
            config = DistillationConfig(temperature=8, hard_label_weight=0.5, intermediate_matches=matches)
            Distillation(settings(tmp_path), config, teacher, student, adaptor, adaptor).train(
                sgd(student, 0.02), None, loader(), 2
            )
        else:
            distiller = theirs.GeneralDistiller(
                theirs.TrainingConfig(log_dir=None, output_dir=str(tmp_path), device="cpu"),
                theirs.DistillationConfig(temperature=8, hard_label_weight=0.5, intermediate_matches=matches),
                teacher, student, adaptor, adaptor,
            )  # fmt: skip
            with distiller:
                distiller.train(sgd(student, 0.02), loader(), num_epochs=2, callback=None)
        found.append(weights(student))
    torch.testing.assert_close(*found)
