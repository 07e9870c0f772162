"""Experts as users start them: plain SGD, FTD, ranks, ends of every sort, the requirement's flags, mistakes."""

import fcntl
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launching import ROOT, start, torchrun, wait
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from config import ConfigError, add_args_from_yaml
from distill_feat import buffer
from utils.augment import draw_augmentation
from utils.expert_buffers import ExpertBuffer, expert_file, find_experts
from utils.image_networks import ImageNetwork, image_network
from utils.normaliser import load_zca
from utils.streams import generator
from utils.utils_image import load_images
from utils.zca import zca_sha256

PROGRAM = ROOT / "distill_feat" / "buffer.py"
FILES = ROOT / "config" / "distill_feat" / "buffer"
CONFIG = {
    "base": str(FILES / "digits.yaml"),
    "dataset": {"size": 8},
    "network": {"width": 8},
    "experts": {"num_experts": 3, "train_epochs": 4, "batch_train": 64},
}
LONG = ("--train_epochs=50", "--num_experts=1", "--mom=0.5", "experts.batch_train=256")


@dataclass(frozen=True)
class Lab:
    """A short configuration over the shipped one."""

    folder: Path

    def words(self, save: str, *more: str, ranks: int = 1) -> list[str | Path]:
        places = (f"--config_path={self.folder / 'short.yaml'}", f"--buffer_path={self.folder / save}")
        return [*torchrun(ranks), PROGRAM, *places, *more]

    def start(self, save: str, *more: str, ranks: int = 1) -> subprocess.Popen[str]:
        return start(self.words(save, *more, ranks=ranks))

    def within(self, save: str, *more: str) -> int:
        """Exit status of the program within this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(word) for word in self.words(save, *more)[1:]])
            return buffer.main()

    def experts(self, save: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / save).rglob("expert_*.safetensors")}

    def rows(self, save: str, expert: int = 0) -> Tensor:
        (path,) = (self.folder / save).rglob(f"expert_{expert}.safetensors")
        return load_file(path)["snapshots"]

    def config(self, *more: str) -> buffer.BufferConfig:
        return add_args_from_yaml(buffer.BufferConfig, self.folder / "short.yaml", more, PROGRAM.parent).config


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With three experts, plain."""
    lab = Lab(tmp_path_factory.mktemp("buffer"))
    (lab.folder / "short.yaml").write_text(yaml.safe_dump(CONFIG))
    assert lab.within("plain") == 0
    return lab


def network(lab: Lab, expert: int = 0) -> ImageNetwork:
    cfg = lab.config()
    return image_network(cfg.network, 1, 8, 10, 0, "expert", expert)


def trained(lab: Lab, epochs: int, momentum: float = 0.0) -> list[Tensor]:
    """Expert 0 by torch's own optimiser."""
    e, data, net = lab.config().experts, load_images(lab.config().dataset).train, network(lab)
    optimizer = torch.optim.SGD(net.parameters(), e.lr_teacher, momentum)
    found = [parameters_to_vector(net.parameters()).detach().clone()]
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator(0, "expert order", 0, epoch))
        for step, which in enumerate(order.split(e.batch_train)):
            x = data.input(which, torch.device("cpu"))
            x = draw_augmentation(e.aug_type, len(x), generator(0, "expert augmentation", 0, epoch, step))(x)
            optimizer.zero_grad()
            cross_entropy(net(x).logits, data.labels[which]).backward()
            optimizer.step()
        found.append(parameters_to_vector(net.parameters()).detach().clone())
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_snapshots_are_those_of_torch_s_sgd_before_training_and_after_every_epoch(lab: Lab, momentum: float) -> None:
    save = f"momentum {momentum}"
    assert lab.within(save, f"--mom={momentum}", "--num_experts=1", "--train_epochs=2") == 0
    rows, expected = lab.rows(save), trained(lab, 2, momentum)
    assert len(rows) == 3
    for row, own in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, own, atol=2e-5, rtol=1e-4)
    assert len({row.sum().item() for row in rows}) == 3  # none is an alias


def test_every_expert_has_its_own_start(lab: Lab) -> None:
    starts = [lab.rows("plain", expert)[0] for expert in range(3)]
    for expert, row in enumerate(starts):
        assert torch.equal(row, parameters_to_vector(network(lab, expert).parameters()))
    assert not torch.equal(starts[0], starts[1])


def test_two_ranks_write_the_same_files(lab: Lab) -> None:
    done = wait(lab.start("ranks", ranks=2))
    assert lab.experts("ranks") == lab.experts("plain") and "experts trained: 3, validation accuracy" in done.err


def test_experts_are_found_and_drawn(lab: Lab) -> None:
    found = find_experts(lab.folder / "plain", "digits", network(lab), "")
    assert len(found) == 3 and torch.equal(found.draw(1, 4), lab.rows("plain", 1)[4])
    with pytest.raises(ConfigError, match="experts of another network"):
        found.check("digits", image_network(lab.config("network.width=9").network, 1, 8, 10, 0, "other"), "")


def test_an_expert_goes_on_from_its_last_epoch_with_the_same_bits(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = {number: lab.start(number.name, *LONG) for number in (signal.SIGKILL, signal.SIGINT)}
    ended, until = dict[signal.Signals, Path](), time.monotonic() + 120
    while waiting:
        for number, process in list(waiting.items()):
            if states := list((lab.folder / number.name).rglob("expert_0.pth")):
                process.send_signal(number)
                done = wait(waiting.pop(number), -number if number == signal.SIGKILL else 128 + number)
                ended[number] = states[0]
                said = f"stopped by {number.name}; the same command goes on from here"
                assert number == signal.SIGKILL or done.last == said
            else:
                assert process.poll() is None and time.monotonic() < until, wait(process, None)
        time.sleep(0.002)
    assert lab.within("whole", *LONG) == 0
    for number, state in ended.items():
        epoch = torch.load(state, weights_only=True)["epoch"]
        assert 0 < epoch < 50 and not lab.experts(number.name)
        capsys.readouterr()
        assert lab.within(number.name, *LONG) == 0
        assert f"expert 0: resumed after epoch {epoch}" in capsys.readouterr().err
        assert lab.experts(number.name) == lab.experts("whole")
        assert {path.suffix for path in state.parent.iterdir()}.isdisjoint({".pth", ".partial"})


def test_a_run_s_folder_is_locked_while_it_trains(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(job: buffer.ExpertJob, expert: int) -> float:
        with (job.folder / ".lock").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        expert_file(job.folder, expert).touch()
        return 0.0

    monkeypatch.setattr(buffer.ExpertJob, "train", refused)
    assert lab.within("locked") == 0


def test_a_state_without_its_snapshots_is_not_gone_on_from(lab: Lab) -> None:
    assert lab.within("lost", "--num_experts=1") == 0
    (path,) = (lab.folder / "lost").rglob("expert_0.safetensors")
    path.unlink()
    torch.save({"w": torch.zeros(1), "speed": torch.zeros(1), "epoch": 3}, path.with_suffix(".pth"))
    assert lab.within("lost", "--num_experts=1") == 0
    assert torch.equal(lab.rows("lost"), lab.rows("plain"))


def test_finished_experts_stay_and_more_are_added(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.within("grows", "--num_experts=1") == 0
    (first,) = (lab.folder / "grows").rglob("expert_*.safetensors")
    stamp = first.stat().st_mtime_ns
    assert lab.within("grows", "--num_experts=1") == 0
    assert "finished already" in capsys.readouterr().err
    assert lab.within("grows") == 0 and first.stat().st_mtime_ns == stamp
    assert lab.experts("grows") == lab.experts("plain") and len(ExpertBuffer(first.parent)) == 3


def test_experts_that_another_process_finished_meanwhile_are_taken(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.within("race", "--num_experts=1") == 0
    monkeypatch.setattr("distill_feat.buffer.has_experts", lambda *_: False)  # as it was before they were written
    assert lab.within("race", "--num_experts=1") == 0
    assert "finished by another process" in capsys.readouterr().err


def test_only_the_epochs_that_are_drawn_are_trained_and_kept(lab: Lab) -> None:
    assert lab.within("some", "--num_experts=1", "experts.first_epoch=1", "experts.last_epoch=3") == 0
    assert torch.equal(lab.rows("some"), lab.rows("plain")[1:4])


def test_radius_zero_is_plain_sgd_and_another_is_not(lab: Lab) -> None:
    ftd = ("--alpha=0", "--num_experts=1", "--train_epochs=2")
    for rho in ("0", "0.5"):
        assert lab.within(f"rho {rho}", f"--rho_max={rho}", f"--rho_min={rho}", *ftd) == 0
    torch.testing.assert_close(lab.rows("rho 0"), lab.rows("plain")[:3], atol=2e-5, rtol=1e-4)
    assert torch.equal(lab.rows("rho 0.5")[0], lab.rows("plain")[0])
    assert not torch.allclose(lab.rows("rho 0.5")[1], lab.rows("plain")[1], atol=1e-3)


def test_whitening_is_fitted_once_and_kept_with_its_experts(lab: Lab) -> None:
    assert lab.within("white", "--zca", "--num_experts=1", "--train_epochs=1") == 0
    (path,) = (lab.folder / "white").rglob("zca.safetensors")
    stamp, data = path.stat().st_mtime_ns, load_images(lab.config().dataset)
    zca = load_zca(path, zca_sha256(data.train))
    found = find_experts(lab.folder / "white", "digits", network(lab), zca.sha256)
    assert torch.equal(found.draw(0, 0), lab.rows("plain")[0])
    assert not torch.allclose(found.draw(0, 1), lab.rows("plain")[1], atol=1e-3)
    assert lab.within("white", "--zca", "--num_experts=2", "--train_epochs=1") == 0
    assert path.stat().st_mtime_ns == stamp
    for more, sha256 in (("white", ""), ("plain", zca.sha256)):
        with pytest.raises(ConfigError, match="set --zca or --no_zca"):
            find_experts(lab.folder / more, "digits", network(lab), sha256)


def test_public_lists_are_converted_by_the_program(lab: Lab, tmp_path: Path) -> None:
    rows, shapes = lab.rows("plain", 2), [p.shape for p in network(lab).parameters()]
    parts = [row.split([shape.numel() for shape in shapes]) for row in rows]
    states = [[p.view(shape) for p, shape in zip(row, shapes, strict=True)] for row in parts]
    torch.save([states], tmp_path / "replay_buffer_0.pt")
    assert lab.within("converted", f"--convert={tmp_path}") == 0
    assert torch.equal(find_experts(lab.folder / "converted", "digits", network(lab), "").draw(0, 3), rows[3])


SUBSETS = ("imagefruit", "imagenette", "imagewoof", "imagemeow", "imagesquawk", "imageyellow")
MTT = "--model=ConvNetD5 --train_epochs=50 --num_experts=100  --buffer_path=buffer_storage --data_path=/ImageNet-1K"
TAIL = "--buffer_path=../buffer_storage/ --data_path=../dataset/"
FTD = f"{TAIL} --rho_max=0.01 --rho_min=0.01 --alpha=0.3 --lr_teacher=0.01 --mom=0. --batch_train=256"
REQUIRED = {  # the requirement's commands: its YAML; data, classes, size, depth, epochs, whitening, rho, GB
    f"--dataset=ImageNet --subset={name} {MTT}": (f"{name}", name, "10", "128", "5", "50", "False", "None", "12.6")
    for name in SUBSETS
} | {
    f"--dataset=CIFAR100 --model=ConvNet --train_epochs=100 --num_experts=100 --zca {FTD}": (
        "cifar100_ftd", "cifar100", "100", "32", "3", "100", "True", "0.01", "20.4"
    ),
    f"--dataset=Tiny --model=ConvNetD4 --train_epochs=100 --num_experts=100  {FTD} --zca": (
        "tiny_ftd", "tinyimagenet", "200", "64", "4", "100", "True", "0.01", "34.6"
    ),
}  # fmt: skip


def values_of(out: str) -> dict[str, str]:
    """What a dry run prints."""
    lines = [line.split(": ", 1) for line in out.splitlines() if line.startswith("  ")]
    return {name.strip(): value.rsplit("  [", 1)[0] for name, value in lines}


@pytest.mark.parametrize("command", REQUIRED)
def test_the_requirement_s_commands_mean_what_they_say_and_so_do_their_files(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data, nclass, size, depth, epochs, zca, rho, total = REQUIRED[command]
    found = []
    for words in (shlex.split(command), [f"--config_path={FILES / file}.yaml"]):
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *words, "--dry_run"])
        assert buffer.main() == 0
        said = capsys.readouterr()
        assert not said.err and f" take {total} GB" in said.out and "nothing can be trained before" in said.out
        found.append(values_of(said.out))
    expected = {
        "dataset.dataset": data, "dataset.nclass": nclass, "dataset.size": size, "network.depth": depth,
        "network.net_type": "convnet", "network.width": "128", "experts.train_epochs": epochs, "zca": zca,
        "experts.num_experts": "100", "experts.rho_max": rho, "experts.rho_min": rho, "experts.alpha": "0.3",
        "experts.lr_teacher": "0.01", "experts.mom": "0.0", "experts.batch_train": "256",
    }  # fmt: skip
    assert expected.items() <= found[0].items()
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"dataset.data_dir", "buffer_path"}


@pytest.mark.parametrize(
    ("more", "parts", "status"),
    [
        ("--rho_max=0.01", ["rho_max: 0.01 and rho_min: None", "give both the same"], 2),
        ("--rho_max=0.02 --rho_min=0.01", ["rho_max: 0.02 and rho_min: 0.01", "give both the same"], 2),
        ("experts.last_epoch=9", ["last_epoch: 9 of train_epochs: 4"], 2),
        ("experts.first_epoch=4", ["first_epoch: 4 and last_epoch: 4", "keep two epochs"], 2),
        ("--dataset=ImageNet", ["imagenet has 1000 classes", "--subset=imagefruit"], 2),
        ("--subset=imagefruit --dataset=ImageNet", ["name ten of them after it"], 2),
        ("--subset=fruit", ["'fruit' is not one of", "did you mean 'imagefruit'?"], 2),
        ("--model=ConvNetD9", ["'ConvNetD9' is not one of"], 2),
        ("--train_epoch=3", ["did you mean '--train_epochs'?"], 2),
        ("--model=ConvNetD5", ["network.depth: 5 needs images of 32 pixels", "lower the depth to 3"], 1),
        ("--dataset=CIFAR10 --data_path=/no/such", ["/no/such", "set dataset.data_dir"], 1),
        ("--zca dataset.size=128", ["are 16384 numbers", "lower dataset.size, or leave zca out"], 1),
        ("--lr_teacher=1e30", ["expert 0: its weights are not finite", "lower lr_teacher"], 1),
        ("--convert=/no/such.pt", ["/no/such.pt: no such file"], 1),
    ],
)
def test_mistake_is_one_line_with_its_remedy(
    lab: Lab, tmp_path: Path, more: str, parts: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.within("", f"--buffer_path={tmp_path}", *more.split()) == status
    *_, line = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert not list(tmp_path.rglob("expert_*.safetensors"))


def test_experts_of_other_data_are_refused(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gen = np.random.default_rng(0)
    data = ("dataset.dataset=own", "dataset.nclass=2", f"--data_path={tmp_path / 'images'}", "--train_epochs=1")
    for status, count in ((0, 1), (1, 2)):
        for part in ("train", "test"):
            for name in "ab":
                folder = tmp_path / "images" / part / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(4):
                    Image.fromarray(gen.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        assert lab.within("own", *data, f"--num_experts={count}") == status
    assert "made from other data" in capsys.readouterr().err.splitlines()[-1]
    assert list(lab.experts("own")) == ["expert_0.safetensors"]


def test_overwriting_starts_again(lab: Lab) -> None:
    assert lab.within("anew", "--num_experts=1") == 0
    (path,) = (lab.folder / "anew").rglob("expert_0.safetensors")
    save_file({"snapshots": torch.zeros(1)}, path)
    assert lab.within("anew", "--num_experts=1", "--overwrite") == 0
    assert torch.equal(lab.rows("anew"), lab.rows("plain"))
