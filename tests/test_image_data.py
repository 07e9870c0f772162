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
from utils.image_readers import SUBSETS, read_images
from utils.utils_image import ImageCorpus, ImageDatasetConfig, fit_size, load_images, stratified


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


def test_splits_are_disjoint_stratified_and_the_same_every_time() -> None:
    labels = torch.arange(1000) % 3
    kept, held = stratified(labels, 0.1)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(1000))
    assert held.tolist() == stratified(labels, 0.1)[1].tolist()
    assert labels[held].bincount().tolist() == [33, 33, 33]


def test_resizing_is_torchvision_s() -> None:
    from torchvision.transforms.v2.functional import center_crop, resize

    images = torch.randint(0, 256, (2, 3, 28, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (32, 16):
        expected = center_crop(resize(images.float(), [size], antialias=True), [size, size])
        assert float((fit_size(images, size).float() - expected).abs().max()) < 0.51  # rounded to whole levels


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
    x = corpus.train.input(torch.arange(len(corpus.train)), torch.device("cpu"))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_cifar_100_has_its_fine_labels(shared_data: Path) -> None:
    corpus = load("cifar100", shared_data / "cifar100" / "cifar-100-python", 100)
    assert len(corpus.train) + len(corpus.val) == 15_000 and len(corpus.classes) == 100
    assert corpus.val.labels.bincount().tolist() == [15] * 100


def test_tiny_imagenet_is_decoded_as_pillow_does(shared_data: Path) -> None:
    from PIL import Image

    folder = shared_data / "tiny-imagenet" / "tiny-imagenet-200"
    corpus = load("tinyimagenet", folder, 10, 64, load_memory=False)
    assert len(corpus.train) + len(corpus.val) == 5_000 and len(corpus.test) == 500
    assert corpus.test.labels.bincount().tolist() == [50] * 10
    path = corpus.train.images[3]
    assert isinstance(path, Path)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(corpus.train.pixels(torch.tensor([3]))[0], expected)
    wnid, names = path.parent.parent.name, (folder / "words.txt").read_text()
    assert f"{wnid}\t{corpus.classes[int(corpus.train.labels[3])]}" in names


class Shout:
    """What a hostile file would hold: loading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def cifar100_files(folder: Path, **train: object) -> Path:
    good = {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 0, 1, 1]}
    files = {"meta": {"fine_label_names": ["a", "b"]}, "train": good | train, "test": good}
    for name, values in files.items():
        (folder / name).write_bytes(pickle.dumps(values))
    return folder


@pytest.mark.parametrize(
    "train",
    [
        {"data": np.zeros((4, 3000), np.uint8)}, {"data": np.zeros((4, 3072))}, {"data": None},
        {"fine_labels": [0, 0, 1, 2]}, {"fine_labels": [0, 0, 1, -1]}, {"fine_labels": [0, 1]},
        {"fine_labels": ["a", "a", "b", "b"]},
    ],
)  # fmt: skip
def test_cifar_values_that_do_not_fit_are_one_line(tmp_path: Path, train: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="train: not a file of CIFAR") as caught:
        load("cifar100", cifar100_files(tmp_path, **train), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hostile", "truncated", "foreign", "empty"])
def test_a_bad_cifar_file_is_one_line_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    cifar100_files(tmp_path)
    good = (tmp_path / "train").read_bytes()
    hostile = pickle.dumps({"data": Shout(tmp_path / "ran"), "fine_labels": [0]})
    bad = {"hostile": hostile, "truncated": good[:100], "foreign": pickle.dumps([1]), "empty": b""}
    (tmp_path / "train").write_bytes(bad[kind])
    with pytest.raises(ConfigError, match="train: .*fetch it again"):
        load("cifar100", tmp_path, 2)
    assert not (tmp_path / "ran").exists()


def idx_file(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    raw = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_idx_files_gzipped_or_not(tmp_path: Path) -> None:
    images = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    for part in ("train", "t10k"):
        idx_file(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        idx_file(tmp_path / f"{part}-labels-idx1-ubyte", np.array([0, 1, 0, 1], np.uint8))
    found = read_images("mnist", tmp_path)
    assert isinstance(found.train.images, torch.Tensor)
    assert np.array_equal(found.train.images[:, 0].numpy(), images) and found.test.labels.tolist() == [0, 1, 0, 1]
    idx_file(tmp_path / "t10k-labels-idx1-ubyte", np.array([0, 1, 0], np.uint8))
    with pytest.raises(ConfigError, match="not a fitting pair of t10k images and labels"):
        read_images("mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0")
    with pytest.raises(ConfigError, match="t10k-labels-idx1-ubyte: not an IDX file"):
        read_images("mnist", tmp_path)
    damaged = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()[:60]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte.gz: not an IDX file"):
        read_images("mnist", tmp_path)


def test_svhn_has_its_images_last_and_10_for_the_digit_0(tmp_path: Path) -> None:
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = (np.arange(20, dtype=np.uint8) % 10 + 1)[:, None]
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels})
    found = read_images("svhn", tmp_path)
    assert isinstance(found.test.images, torch.Tensor)
    assert np.array_equal(found.test.images[7, 2].numpy(), images[:, :, 2, 7])
    assert found.test.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    for damaged in (b"", b"<html>" * 100):
        (tmp_path / "test_32x32.mat").write_bytes(damaged)
        with pytest.raises(ConfigError, match="test_32x32.mat: not a file of SVHN"):
            read_images("svhn", tmp_path)


def own_folder(root: Path, names: tuple[str, ...], parts: tuple[str, ...] = ("train", "val")) -> Path:
    from PIL import Image

    for part in parts:
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


def test_a_validation_part_of_the_user_s_own_is_kept(tmp_path: Path) -> None:
    corpus = load("pets", own_folder(tmp_path, ("cat", "dog"), ("train", "val", "test")), 2, 16)
    assert [len(part) for part in (corpus.train, corpus.val, corpus.test)] == [8, 8, 8]


def test_a_test_folder_without_classes_leaves_val_for_testing(tmp_path: Path) -> None:
    own_folder(tmp_path, ("cat", "dog"))
    (tmp_path / "test").mkdir()  # ImageNet's, whose labels are secret
    (tmp_path / "test" / "1.JPEG").write_bytes(b"")
    (tmp_path / "train" / ".hidden").mkdir()
    corpus = load("pets", tmp_path, 2, 16)
    assert [len(part) for part in (corpus.train, corpus.val, corpus.test)] == [6, 2, 8]


@pytest.mark.parametrize("where", ["train/cat", "val/dog"])
def test_an_empty_class_is_named(tmp_path: Path, where: str) -> None:
    own_folder(tmp_path, ("cat", "dog"))
    for path in (tmp_path / where).iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=f"{Path(where).parent} holds no images of class {Path(where).name}"):
        load("pets", tmp_path, 2, 16)


def test_a_damaged_image_is_named_and_a_class_only_for_testing_too(tmp_path: Path) -> None:
    path = own_folder(tmp_path, ("cat", "dog")) / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="cat/0.png: not an image"):
        load("pets", tmp_path, 2, 16)
    (tmp_path / "val" / "emu").mkdir()
    with pytest.raises(ConfigError, match="val holds class emu, which train/ does not"):
        load("pets", tmp_path, 2, 16)


def test_an_imagenet_subset_takes_its_own_classes_in_its_own_order(tmp_path: Path) -> None:
    wanted = SUBSETS["imagewoof"].split()
    found = read_images("imagewoof", own_folder(tmp_path, (*wanted, "n00000001")))
    assert list(found.classes) == wanted and len(set(wanted)) == 10
    assert found.train.labels.bincount().tolist() == [4] * 10


def test_wordnet_ids_stand_in_the_order_of_the_published_imagenet_indices() -> None:
    published = {  # positions among ImageNet's 1,000 classes, which are sorted by their id
        "imagenette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
        "imagewoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
        "imagefruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
        "imagemeow": [281, 282, 283, 284, 285, 291, 292, 290, 289, 287],
        "imagesquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
        "imageyellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
    }
    index_of = {w: i for name, ids in published.items() for w, i in zip(SUBSETS[name].split(), ids, strict=True)}
    assert len(index_of) == len({i for ids in published.values() for i in ids}) == 57  # three classes are in two sets
    assert sorted(index_of) == sorted(index_of, key=index_of.__getitem__)


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
