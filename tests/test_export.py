"""An exported set: the same tensors back, its bytes counted, its loader alone, damage in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from torch import Tensor

from condenser.export import LOADER, export, load_export
from condenser.synthetic_set import Note, SyntheticSet
from config import ConfigError
from utils.normaliser import Normaliser, Zca

NOTES: dict[str, Note] = {
    "dataset": "digits", "factor": 1, "form": "channel", "pooling": "avg", "layer_idx": 0, "lbd": 0.1,
    "use_feature": "mean", "scope": "sample", "net": "ConvNet of 3 blocks of 128 channels, instance norm",
}  # fmt: skip


def whole(soft: bool = False, scope: str = "sample") -> SyntheticSet:
    gen = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    targets = torch.rand(6, 3, generator=gen).softmax(1) if soft else torch.eye(3)[owner]
    features = torch.randn(2, 3 if scope == "class" else 6, 5, generator=gen)
    normaliser = Normaliser(torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.2, 0.19, 0.21]))
    data = torch.rand(6, 3, 4, 4, generator=gen)
    return SyntheticSet(data, targets, owner, None, NOTES | {"scope": scope}, features, normaliser)


def fields(found: SyntheticSet) -> list[Tensor]:
    assert found.features is not None and found.normaliser is not None
    return [found.data, found.targets, found.owner, found.features, found.normaliser.mean, found.normaliser.std]


def white() -> SyntheticSet:
    found, gen = whole(), torch.Generator().manual_seed(1)
    matrix = torch.randn(48, 48, generator=gen)
    zca = Zca(torch.rand(3, 4, 4, generator=gen), matrix @ matrix.T, torch.eye(48), "a hash")
    assert found.normaliser is not None
    return replace(found, normaliser=replace(found.normaliser, zca=zca))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scope", ["sample", "class"])
def test_an_exported_set_comes_back_to_the_bit(tmp_path: Path, soft: bool, scope: str) -> None:
    found = whole(soft, scope)
    export(found, tmp_path)
    again = load_export(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fields(found), fields(again), strict=True))
    assert again.meta == found.meta and list(map(type, again.meta.values())) == list(map(type, found.meta.values()))


def test_a_set_without_features_is_exported_too(tmp_path: Path) -> None:
    export(replace(whole(), features=None), tmp_path)
    assert load_export(tmp_path).features is None


def test_the_description_counts_the_bytes_that_lie_in_the_file(tmp_path: Path) -> None:
    for soft in (False, True):
        export(whole(soft), tmp_path)
        raw, known = (tmp_path / "set.safetensors").read_bytes(), json.loads((tmp_path / "set.json").read_bytes())
        assert known["bytes"] == len(raw) - 8 - int.from_bytes(raw[:8], "little")  # safetensors: length, header, data
        arrays = load_numpy(tmp_path / "set.safetensors")
        assert known["parts"] == {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "elements": array.size, "bytes": array.nbytes}
            for name, array in arrays.items()
        }
        assert known["classes"] == 3 and known["meta"]["lbd"] == 0.1
        assert np.array(known["std"], np.float32).tolist() == np.array([0.2, 0.19, 0.21], np.float32).tolist()


def test_hard_labels_are_stored_as_ids_and_others_as_they_are(tmp_path: Path) -> None:
    export(whole(), tmp_path / "hard")
    assert load_file(tmp_path / "hard" / "set.safetensors").keys() == {"images", "labels", "features"}
    for number, targets in enumerate((whole(soft=True).targets, torch.ones(6, 3), 0.5 * whole().targets)):
        found = whole().with_targets(targets)
        export(found, tmp_path / str(number))
        assert torch.equal(load_file(tmp_path / str(number) / "set.safetensors")["soft_labels"], targets)
        assert torch.equal(load_export(tmp_path / str(number)).owner, found.owner)


def test_a_whitened_set_comes_back_with_its_whitening(tmp_path: Path) -> None:
    found = white()
    export(found, tmp_path)
    again = load_export(tmp_path)
    assert found.normaliser and found.normaliser.zca and again.normaliser and again.normaliser.zca
    assert again.normaliser.zca.sha256 == "a hash" and torch.equal(again.data, found.data)
    for name in ("mean", "transform", "inverse"):
        assert torch.equal(getattr(again.normaliser.zca, name), getattr(found.normaliser.zca, name))
    replace(found.normaliser.zca, sha256="another").save(tmp_path / "zca.safetensors")
    with pytest.raises(ConfigError, match=r"zca\.safetensors: made with ZCA another, but this run has ZCA a hash"):
        load_export(tmp_path)
    (tmp_path / "zca.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"zca\.safetensors: not a ZCA transform"):
        load_export(tmp_path)


@pytest.mark.parametrize("zca", [False, True])
def test_the_loader_runs_without_this_package(tmp_path: Path, zca: bool) -> None:
    found = white() if zca else whole()
    export(found, tmp_path)
    code = (
        "import runpy, sys; load = runpy.run_path('load.py')['load']; ours = {'condenser', 'utils', 'config', 'NCFM'}; "
        "assert not ours & {name.split('.')[0] for name in sys.modules}; import torch; torch.save(load(), 'out.pt')"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, check=True)
    images, labels, features = torch.load(tmp_path / "out.pt")
    assert found.features is not None
    mean, std = (np.array(values, np.float32)[:, None, None] for values in ([0.49, 0.48, 0.45], [0.2, 0.19, 0.21]))
    if found.normaliser and found.normaliser.zca:
        own = found.normaliser.zca
        rows = (found.data - own.mean).flatten(1).double().numpy() @ own.transform.double().numpy()
        np.testing.assert_allclose(images.flatten(1), rows, rtol=1e-4, atol=1e-4)
        assert torch.equal(images, found.normaliser(found.data))
    else:
        np.testing.assert_array_equal(images, (found.data.numpy() - mean) / std)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(features, found.features)
    assert len(LOADER.splitlines()) <= 14


@pytest.mark.parametrize("change, part", [
    ({"normaliser": None}, "no normaliser"),
    ({"meta": NOTES | {"factor": 2}}, "factor 2"),
    ({"data": torch.rand(6, 4, 8)}, r"shape \(4, 8\)"),
    ({"features": torch.zeros(2, 5, 5)}, "features of 5 rows for 6 samples"),
])  # fmt: skip
def test_a_set_that_cannot_be_exported_is_one_line(tmp_path: Path, change: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part) as error:
        export(replace(whole(), **change), tmp_path)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and not (tmp_path / "set.json").exists()


def damage(folder: Path, kind: str) -> None:
    tensors, notes = folder / "set.safetensors", folder / "set.json"
    if kind == "bit":
        raw = bytearray(tensors.read_bytes())
        raw[-1] ^= 1
        tensors.write_bytes(raw)
    elif kind == "cut":
        tensors.write_bytes(tensors.read_bytes()[:300])
    elif kind in ("no tensors", "no notes"):
        (tensors if kind == "no tensors" else notes).unlink()
    elif kind == "another":
        export(whole(soft=True), folder / "other")
        tensors.write_bytes((folder / "other" / "set.safetensors").read_bytes())
    elif kind == "text":
        notes.write_bytes(notes.read_bytes()[:-9] + b"\xff")
    else:
        known = json.loads(notes.read_text())
        changes = {"classes": 2, "mean": [0.5], "std": [0.2, 0.0, 0.2], "meta": {"scope": ["all"]}, "bytes": None}
        notes.write_text(json.dumps(known | {kind: changes[kind]}))


KINDS = "bit, cut, no tensors, no notes, another, text, classes, mean, std, meta, bytes"


@pytest.mark.parametrize("kind", KINDS.split(", "))
def test_damage_is_one_line(tmp_path: Path, kind: str) -> None:
    export(whole(), tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(ConfigError, match=r"set\.(json|safetensors): ") as error:
        load_export(tmp_path)
    assert "\n" not in str(error.value)
