"""Image data sets as they lie on disk, against independent reads; hostile and damaged files."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from config import ConfigError
from utils.image_readers import SUBSETS, fit_size, read_images
from utils.utils_image import ImageCorpus, ImageDatasetConfig, load_images


def load(name: str, folder: Path | None, nclass: int = 10, size: int = 32, **more: object) -> ImageCorpus:
    values = {"dataset": name, "nclass": nclass, "size": size, "data_dir": folder, **more}
    return load_images(ImageDatasetConfig.model_validate(values))


@pytest.fixture(scope="module")
def digits() -> ImageCorpus:
    return load("digits", None, size=16)


def test_digits_are_sklearn_s_and_split_by_class(digits: ImageCorpus) -> None:
    from sklearn.datasets import load_digits

    assert len(digits.train) + len(digits.val) + len(digits.test) == len(load_digits().target) == 1797
    assert digits.test.labels.bincount().tolist() == [30] * 10
    share = digits.val.labels.bincount() / (digits.val.labels.bincount() + digits.train.labels.bincount())
    assert float((share - 0.1).abs().max()) < 0.01
    assert digits.train.pixels(torch.arange(2)).shape == (2, 1, 16, 16)


def test_training_part_has_mean_0_and_deviation_1(digits: ImageCorpus) -> None:
    x, targets = digits.train.batch(torch.arange(len(digits.train)), torch.device("cpu"))
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-4
    assert torch.equal(targets.argmax(1), digits.train.labels)


def test_resizing_keeps_a_flat_image_and_cuts_the_centre() -> None:
    assert torch.equal(fit_size(torch.full((1, 3, 20, 28), 77, dtype=torch.uint8), 32).unique(), torch.tensor([77]))
    wide = torch.zeros(1, 1, 8, 16, dtype=torch.uint8)
    wide[..., 4:12] = 200
    assert torch.equal(fit_size(wide, 8), torch.full((1, 1, 8, 8), 200, dtype=torch.uint8))


def test_cifar_is_read_as_an_independent_reader_does(shared_data: Path) -> None:
    corpus = load("cifar10", shared_data / "cifar10")
    assert len(corpus.train) + len(corpus.val) == 12_000 and len(corpus.test) == 3_000
    assert (corpus.train.labels.bincount() + corpus.val.labels.bincount()).tolist() == [1200] * 10
    with (shared_data / "cifar10" / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        raw = pickle.load(file, encoding="latin1")
    assert isinstance(corpus.test.images, torch.Tensor)
    assert np.array_equal(corpus.test.images[7].numpy().ravel(), raw["data"][7])
    assert corpus.test.labels[:20].tolist() == list(raw["labels"][:20])


def test_cifar_100_has_its_fine_labels(shared_data: Path) -> None:
    corpus = load("cifar100", shared_data / "cifar100" / "cifar-100-python", 100)
    assert len(corpus.train) + len(corpus.val) == 15_000 and len(corpus.classes) == 100
    assert corpus.val.labels.bincount().tolist() == [15] * 100


def test_tiny_imagenet_is_decoded_as_pillow_does(shared_data: Path) -> None:
    from PIL import Image

    folder = shared_data / "tiny-imagenet" / "tiny-imagenet-200"
    corpus = load("tinyimagenet", folder, 10, 64, load_memory=False)
    assert len(corpus.train) + len(corpus.val) == 5_000 and len(corpus.test) == 500
    path = corpus.train.images[3]
    assert isinstance(path, Path)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(corpus.train.pixels(torch.tensor([3]))[0], expected)


class Shout:
    """What a hostile file would hold: loading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["hostile", "truncated", "foreign"])
def test_a_bad_cifar_file_is_one_line_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    good = pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 0, 1, 1]})
    bad = {"hostile": pickle.dumps(Shout(tmp_path / "ran")), "truncated": good[:100], "foreign": pickle.dumps({"x": 1})}
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b"]}))
    (tmp_path / "train").write_bytes(bad[kind])
    (tmp_path / "test").write_bytes(good)
    with pytest.raises(ConfigError, match="train: .*fetch it again"):
        load("cifar100", tmp_path, 2)
    assert not (tmp_path / "ran").exists()


def test_idx_files_gzipped_or_not(tmp_path: Path) -> None:
    images = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    for part in ("train", "t10k"):
        raw = struct.pack(">iiii", 0x00000803, 4, 28, 28) + images.tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x00000801, 4) + bytes([0, 1, 0, 1]))
    found = read_images("mnist", tmp_path, 28)
    assert isinstance(found.train.images, torch.Tensor)
    assert np.array_equal(found.train.images[:, 0].numpy(), images) and found.test.labels.tolist() == [0, 1, 0, 1]
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0")
    with pytest.raises(ConfigError, match="t10k-labels-idx1-ubyte: not an IDX file"):
        read_images("mnist", tmp_path, 28)


def own_folder(root: Path, names: tuple[str, ...]) -> Path:
    from PIL import Image

    for part in ("train", "val"):
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 16), (50 * label, 0, 0)).save(root / part / name / f"{i}.png")
    return root


def test_a_folder_a_class_is_a_data_set(tmp_path: Path) -> None:
    corpus = load("pets", own_folder(tmp_path, ("cat", "dog")), 2, 16)
    assert corpus.classes == ("cat", "dog") and len(corpus.val) == 2 and len(corpus.test) == 8
    x = corpus.test.pixels(torch.tensor([0, 7]))[:, 0, 0, 0] * 255
    assert x.round().tolist() == [0.0, 50.0]


def test_an_imagenet_subset_takes_its_own_classes_in_its_own_order(tmp_path: Path) -> None:
    wanted = SUBSETS["imagewoof"].split()
    found = read_images("imagewoof", own_folder(tmp_path, (*wanted, "n00000001")), 16)
    assert list(found.classes) == wanted and len(set(wanted)) == 10
    assert found.train.labels.bincount().tolist() == [4] * 10


@pytest.mark.parametrize(
    ("name", "part"),
    [("cifar10", "data_batch_1"), ("pets", "train"), ("svhn", "train_32x32.mat"), ("mnist", "train-images")],
)
def test_an_absent_file_is_named(tmp_path: Path, name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"data_dir.*{part}"):
        load(name, tmp_path)


def test_a_wrong_number_of_classes_and_a_missing_folder_are_named() -> None:
    with pytest.raises(ConfigError, match="dataset.nclass: 7, but digits has 10"):
        load("digits", None, 7, 16)
    with pytest.raises(ConfigError, match="no folder /no/data"):
        load("cifar10", Path("/no/data"))
