"""The artefact, its files, and where rows start."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from condenser.coresets import herding_subset, k_center_subset, random_subset
from condenser.synthetic_set import ZCA_FILE, Note, SyntheticSet, checked, load_dataset, load_synthetic
from condenser.synthetic_text import RowShape, decode, framed, student_view
from config import ConfigError
from utils.normaliser import Normaliser, Zca


def small() -> SyntheticSet:
    mask = torch.ones(4, 6, dtype=torch.uint8)
    return SyntheticSet(torch.randn(4, 6, 3), torch.eye(2).repeat(2, 1), torch.tensor([0, 0, 1, 1]), mask,
                        {"decode_type": "single", "factor": 2})  # fmt: skip


def test_a_set_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    whole = small()
    whole.save(tmp_path / "x.pth")
    again = load_synthetic(tmp_path / "x.pth")
    assert torch.equal(again.data, whole.data) and again.meta == whole.meta
    data, mask, targets = load_dataset(tmp_path / "x.pth")[1]
    assert torch.equal(data, whole.data[1]) and torch.equal(targets, whole.targets[1]) and mask.shape == (6,)


def test_a_public_pair_of_tensors_is_read(tmp_path: Path) -> None:
    torch.save([torch.randn(4, 6, 3), torch.eye(4)], tmp_path / "old.pth")
    assert load_synthetic(tmp_path / "old.pth").owner.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_class_ids_are_read_as_one_hot_labels(tmp_path: Path, kind: torch.dtype) -> None:
    ids = torch.tensor([0, 2, 1, 2])
    torch.save([torch.randn(4, 6, 3), ids.to(kind)], tmp_path / "ids.pth")
    found = checked(load_synthetic(tmp_path / "ids.pth"), tmp_path / "ids.pth", (6, 3), 3)
    assert torch.equal(found.targets, torch.eye(3)[ids]) and torch.equal(found.owner, ids)
    assert student_view(found).targets.shape == (4, 3)


@pytest.mark.parametrize("wrong", [-1, 3, 0.5])
def test_class_ids_out_of_range_are_refused(tmp_path: Path, wrong: float) -> None:
    torch.save([torch.randn(2, 6, 3), torch.tensor([0, wrong])], tmp_path / "ids.pth")
    with pytest.raises(ConfigError, match=f"ids.pth: class {wrong}.*0 to 2"):
        checked(load_synthetic(tmp_path / "ids.pth"), tmp_path / "ids.pth", (6, 3), 3)


class Shout:
    """What a hostile file would hold: loading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "code in a set", "truncated", "foreign"])
def test_a_bad_file_is_one_line_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    path, marker = tmp_path / "bad.pth", tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Shout(marker)))
    elif kind == "code in a set":
        torch.save({"data": torch.zeros(1, 2, 3), "targets": torch.eye(1), "owner": Shout(marker)}, path)
    elif kind == "truncated":
        small().save(path)
        path.write_bytes(path.read_bytes()[:300])
    else:
        torch.save({"model": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="bad.pth") as error:
        load_synthetic(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_decoding_cuts_rows_into_spans_with_the_rows_labels() -> None:
    whole = small()
    data, _ = decode(whole.data, torch.ones(4, 6), 2)
    assert torch.equal(data[3], whole.data[1, 3:])
    view = student_view(whole)
    assert len(view) == 8 and torch.equal(view.targets[2], whole.targets[1])


def test_each_span_of_a_split_row_is_framed() -> None:
    pieces = [torch.tensor([11, 12, 13, 14, 15, 16, 17]), torch.tensor([21])]
    ids, mask = framed(pieces, RowShape(12, 2, True, 1, 2, 0))
    assert ids.tolist() == [1, 11, 12, 13, 14, 2, 1, 21, 2, 0, 0, 0]
    assert mask.tolist() == [1] * 9 + [0] * 3
    ids, _ = framed(pieces, RowShape(12, 2, False, 1, 2, 0))
    assert ids.tolist() == [1, 11, 12, 13, 14, 15, 21, 2, 0, 0, 0, 0]


def test_a_random_subset_has_each_classs_share() -> None:
    members = [torch.arange(0, 30), torch.tensor([30]), torch.arange(20, 40)]
    chosen = set(random_subset(members, 5, 0).tolist())
    assert [len(chosen & set(m.tolist())) >= k for m, k in zip(members, (5, 1, 5), strict=True)] == [True] * 3
    assert random_subset(members, 5, 0).tolist() != random_subset(members, 5, 1).tolist()


def test_k_center_takes_the_far_points() -> None:
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0], [-9.0]])
    assert set(k_center_subset([torch.arange(5)], 3, points).tolist()) >= {3, 4}


def test_samples_without_masks_or_with_too_few_labels(tmp_path: Path) -> None:
    images = SyntheticSet(torch.randn(2, 3, 4, 4), torch.eye(2), torch.arange(2))
    images.save(tmp_path / "images.pth")
    assert load_synthetic(tmp_path / "images.pth").attention_mask is None
    assert [tuple(v.shape) for v in load_dataset(tmp_path / "images.pth")[0]] == [(3, 4, 4), (2,)]
    torch.save([torch.randn(3, 6, 2), torch.eye(2)], tmp_path / "short.pth")
    with pytest.raises(ConfigError, match="3 samples but 2 labels"):
        load_synthetic(tmp_path / "short.pth")


def test_subsets_take_ipc_of_every_class_and_all_of_a_smaller_one() -> None:
    members = [torch.arange(0, 30), torch.arange(30, 33), torch.arange(33, 60)]
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    subsets = random_subset(members, 5, 0), herding_subset(members, 5, features), k_center_subset(members, 5, features)
    for chosen in subsets:
        assert [int(torch.isin(own, chosen).sum()) for own in members] == [5, 3, 5]


@pytest.mark.parametrize("pick", ["random", "herding", "k-center"])
def test_a_class_finds_its_share_however_many_of_its_first_were_taken(pick: str) -> None:
    members = [torch.arange(i, i + 5) for i in range(0, 30, 5)] + [torch.arange(60)]  # six small ones within a large
    if pick == "random":
        chosen = random_subset(members, 5, 0)
    elif pick == "herding":  # 0 to 29 stand in the mean, so they come first
        others = torch.randn(15, 4, generator=torch.Generator().manual_seed(0))
        chosen = herding_subset(members, 5, torch.cat([torch.zeros(30, 4), others, -others]))
    else:  # 0 to 29 stand far from each other and from the rest
        points = torch.cat([100 * torch.eye(30), torch.zeros(30, 30)])
        chosen = k_center_subset(members, 5, points)
    assert chosen[:30].tolist() == list(range(30))
    assert len(chosen) == len(chosen.unique()) == 35


def test_herding_picks_the_samples_whose_mean_is_the_classs() -> None:
    points = torch.tensor([[0.0, 9.0], [1.0, 0.0], [-1.0, 0.2], [0.0, -9.2]])  # mean 0
    assert herding_subset([torch.arange(4)], 2, points).tolist() == [1, 2]


def test_k_center_takes_ipc_samples_where_documents_repeat() -> None:
    assert len(k_center_subset([torch.arange(6)], 3, torch.ones(6, 2))) == 3


@pytest.mark.parametrize("change", [{"data": 3}, {"meta": None}, {"attention_mask": torch.ones(4, 5)}])
def test_fields_of_another_kind_are_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    whole = small()
    fields = {"data": whole.data, "targets": whole.targets, "owner": whole.owner, "meta": whole.meta}
    torch.save(fields | change, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match="odd.pth"):
        load_synthetic(tmp_path / "odd.pth")


def labelled(rows: int = 4, scope: str = "sample") -> SyntheticSet:
    features = torch.randn(3, rows, 5, generator=torch.Generator().manual_seed(0))
    normaliser = Normaliser(torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3]))
    meta: dict[str, Note] = {"form": "channel", "layer_idx": 0, "lbd": 0.1, "scope": scope}
    return SyntheticSet(torch.rand(4, 2, 8, 8), torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), None, meta,
                        features, normaliser)  # fmt: skip


@pytest.mark.parametrize("rows, scope", [(4, "sample"), (2, "class")])
def test_feature_labels_and_normaliser_come_back_as_they_were(tmp_path: Path, rows: int, scope: str) -> None:
    found = labelled(rows, scope)
    found.save(tmp_path / "x.pth")
    again = load_synthetic(tmp_path / "x.pth")
    assert found.features is not None and again.features is not None and again.normaliser is not None
    assert torch.equal(again.features, found.features) and again.meta == found.meta
    assert again.normaliser.std.tolist() == torch.tensor([0.2, 0.3]).tolist()
    assert again.with_targets(torch.ones(4, 2)).features is again.features


def whitened(number: int = 1) -> SyntheticSet:
    """With a transform of its own, number * 1."""
    found, one = labelled(), torch.eye(128)
    zca = Zca(torch.full((2, 8, 8), 0.5), number * one, one / number, f"hash {number}")
    assert found.normaliser is not None
    return replace(found, normaliser=replace(found.normaliser, zca=zca))


def test_a_whitened_set_comes_with_its_transform_once_for_a_folder(tmp_path: Path) -> None:
    found = whitened(2)
    found.save(tmp_path / "a.pth")
    stamp = (tmp_path / ZCA_FILE).stat().st_mtime_ns
    found.save(tmp_path / "b.pth")
    assert (tmp_path / ZCA_FILE).stat().st_mtime_ns == stamp
    assert (tmp_path / "b.pth").stat().st_size < 20000 < (tmp_path / ZCA_FILE).stat().st_size
    for name in ("a.pth", "b.pth"):
        again = load_synthetic(tmp_path / name)
        assert again.normaliser is not None and torch.equal(again.data, found.data)  # pixels
        assert torch.equal(again.normaliser(again.data), 2 * (found.data - 0.5))
        assert torch.equal(again.normaliser.inverse(again.normaliser(again.data)), found.data)


@pytest.mark.parametrize("what, part", [
    ("absent", "not a ZCA transform"),
    ("another's", "made with ZCA hash 3, but this run has ZCA hash 2"),
    ("of another shape", r"whitening of \(1, 8, 16\) for data of \(4, 2, 8, 8\)"),
])  # fmt: skip
def test_a_whitening_that_is_not_the_set_s_is_one_line(tmp_path: Path, what: str, part: str) -> None:
    found, file = whitened(2), tmp_path / ZCA_FILE
    assert found.normaliser is not None and found.normaliser.zca is not None
    found.save(tmp_path / "x.pth")
    file.unlink()
    if what == "another's":
        whitened(3).save(tmp_path / "y.pth")
    elif what == "of another shape":
        replace(found.normaliser.zca, mean=torch.zeros(1, 8, 16)).save(file)
    with pytest.raises(ConfigError, match=part) as error:
        load_synthetic(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def test_bytes_count_the_feature_labels_as_stored() -> None:
    found = labelled()
    assert found.nbytes == 4 * 4 * 2 * 8 * 8 + 4 * 3 * 4 * 5
    assert replace(found, features=torch.zeros(3, 4, 5).half()).nbytes == 4 * 4 * 2 * 8 * 8 + 2 * 3 * 4 * 5
    assert replace(found, features=None).nbytes == 4 * 4 * 2 * 8 * 8


@pytest.mark.parametrize("change, part", [
    ({"features": torch.zeros(3, 5, 5)}, "features of 5 rows for 4 samples"),
    ({"features": torch.zeros(3, 4, 5), "meta": {"scope": "class"}}, "features of 4 rows for 2 classes"),
    ({"features": torch.zeros(3, 4, 5, dtype=torch.int32)}, "type int32"),
    ({"features": torch.zeros(4, 5)}, r"shape \(4, 5\)"),
    ({"features": torch.zeros(0, 4, 5)}, r"shape \(0, 4, 5\)"),
    ({"features": [1.0]}, "another kind"),
    ({"meta": {"scope": "image"}}, "scope 'image'"),
    ({"meta": {"scope": torch.zeros(1)}}, "another kind"),
    ({"mean": torch.zeros(3)}, "normaliser of 3 channels"),
    ({"std": torch.zeros(2)}, r"deviation \[0.0, 0.0\]"),
    ({"mean": torch.full((2,), torch.nan)}, "mean .nan"),
    ({"std": None}, "another kind"),
])  # fmt: skip
def test_feature_labels_that_do_not_fit_are_one_line(tmp_path: Path, change: dict[str, object], part: str) -> None:
    labelled().save(tmp_path / "odd.pth")
    torch.save(torch.load(tmp_path / "odd.pth") | change, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match=f"odd.pth: .*{part}") as error:
        load_synthetic(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_feature_labels_that_are_not_finite_are_refused(value: float) -> None:
    found = labelled()
    assert checked(found, Path("x.pth"), (2, 8, 8), 2).features is found.features
    with pytest.raises(ConfigError, match="x.pth: holds values that are not finite"):
        checked(replace(found, features=torch.full((3, 4, 5), value)), Path("x.pth"), (2, 8, 8), 2)
