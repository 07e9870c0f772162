"""Checkpoints and artefacts that are damaged, lie or carry code: one line each, nothing run, no gigabytes."""

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Deed, at_most, damaged, deeds, examples, hold, read_or_refused, wrapped
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from condenser.export import load_export
from condenser.synthetic_set import SyntheticSet, checked, load_dataset, load_synthetic
from config import ConfigError
from utils.checkpoint import load_json, load_pth, load_tensors, previous
from utils.expert_buffers import ExpertBuffer, ExpertNotes, expert_file, parameters_of, read_notes, replayed
from utils.normaliser import Normaliser, load_zca
from utils.teachers import load_bank, member_files

TYPES = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.bfloat16)
sizes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.builds(lambda shape, kind: torch.ones(shape).to(kind), sizes, st.sampled_from(TYPES))
plain = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3))
values = st.one_of(tensors, tensors, plain, st.dictionaries(st.text(max_size=3), plain, max_size=2))


def pth(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def rezipped(raw: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A .pth whose zip is sound and whose pickle is changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


def small_set() -> SyntheticSet:
    data, owner = torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])
    norm = Normaliser(torch.zeros(1), torch.ones(1))
    return SyntheticSet(data, torch.eye(2)[owner], owner, None, {"ipc": 2}, torch.rand(1, 4, 6), norm)


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    small_set().save(tmp_path / "good.pth")
    return (tmp_path / "good.pth").read_bytes()


def read_set(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    read_or_refused(lambda: checked(load_synthetic(path), path, (1, 8, 8), 2))


@examples(100)
def test_a_damaged_set_is_read_or_refused(tmp_path: Path, good: bytes, count: int) -> None:
    hold(count, lambda content: read_set(tmp_path / "x.pth", content), damaged(good))


@examples(100)
def test_a_set_whose_pickle_is_damaged_is_read_or_refused(tmp_path: Path, good: bytes, count: int) -> None:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        inner = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    hold(
        count,
        lambda content: read_set(tmp_path / "x.pth", rezipped(good, lambda _: content)),
        damaged(inner),
    )


@examples(60)
def test_an_old_file_of_tensors_that_is_damaged_is_read_or_refused(tmp_path: Path, count: int) -> None:
    old = pth([torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])], _use_new_zipfile_serialization=False)
    read_set(tmp_path / "x.pth", old)
    assert load_synthetic(tmp_path / "x.pth").owner.tolist() == [0, 0, 1, 1]
    hold(count, lambda content: read_set(tmp_path / "x.pth", content), damaged(old))


FIELDS = ("data", "targets", "owner", "meta", "attention_mask", "features", "mean", "std", "zca")


@examples(100)
def test_a_set_of_any_fields_is_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.pth"

    def claim(case: Any) -> None:
        path.write_bytes(pth(case))
        read_or_refused(lambda: checked(load_synthetic(path), path, (1, 2, 2), 3))
        read_or_refused(lambda: load_dataset(path))

    rows = st.integers(0, 3).flatmap(
        lambda n: st.fixed_dictionaries(
            {"data": st.just(torch.rand(n, 1, 2, 2)), "targets": st.sampled_from([torch.rand(n, 3), torch.zeros(n)]),
             "owner": st.just(torch.zeros(n, dtype=torch.long)), "meta": st.one_of(st.just({}), values)},
            optional=dict.fromkeys(FIELDS[4:], values),
        )
    )  # fmt: skip
    hold(count, claim, st.one_of(rows, st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, values)), values))


@examples(60)
def test_code_in_a_file_of_tensors_does_not_run(tmp_path: Path, count: int) -> None:
    mark, path = tmp_path / "ran", tmp_path / "x.pth"

    def claim(case: tuple[Any, bool, int]) -> None:
        value, zipped, protocol = case
        path.write_bytes(pth(value, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol))
        for reader in (load_pth, load_synthetic, lambda path: replayed(path, (("w", (2,)),))):
            with pytest.raises(ConfigError, match="not a readable file of tensors"):
                reader(path)
        assert not mark.exists()

    hold(count, claim, st.tuples(wrapped(deeds(mark)), st.booleans(), st.integers(0, 5)))


def lie(old: bytes, new: bytes, count: int) -> bytes:
    """A tensor of 300 floats whose pickle says otherwise."""
    raw = pth({"data": torch.ones(300), "targets": torch.ones(300), "owner": torch.zeros(300)})

    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, count)

    return rezipped(raw, change)


SHORT, LONG = b"M\x2c\x01", b"J\x00\x00\x00\x7f"  # 300 and 2 130 706 432, as pickles hold them
LIES = {
    "storage and shape": lie(SHORT, LONG, -1),
    "shape": lie(SHORT + b"\x85", LONG + b"\x85", -1),
    "no step between values": pth({"data": torch.ones(1).expand(10**5, 10**5), "targets": torch.ones(1)}),
    "on no device": pth({"data": torch.ones(10**5, 10**5, device="meta")}),
    "sparse": pth({"data": torch.ones(1, 1).to_sparse(), "targets": torch.ones(1), "owner": torch.ones(1)}),
    "old, storage": pth([torch.ones(300)], _use_new_zipfile_serialization=False).replace(SHORT, LONG),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_file_of_tensors_that_lies_of_its_size_is_refused_and_takes_no_memory(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.pth").write_bytes(LIES[kind])
    with at_most(200), pytest.raises(ConfigError, match="not a readable file of tensors"):
        load_synthetic(tmp_path / "x.pth")


def test_a_storage_that_says_it_is_longer_than_the_file_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(lie(SHORT + b"t", LONG + b"t", -1))
    with at_most(200):
        assert torch.equal(load_synthetic(tmp_path / "x.pth").data, torch.ones(300))


def test_a_file_of_tensors_may_share_them_and_is_read_to_the_end(tmp_path: Path) -> None:
    tied = torch.rand(50, 3)
    (tmp_path / "x.pth").write_bytes(pth({"a": [tied, tied], "b": (tied[:2], {"c": tied.t()})}))
    found = load_pth(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"")  # read to the end: nothing is left in the file
    assert torch.equal(found["a"][1], tied) and torch.equal(found["b"][1]["c"], tied.t())


headers = st.dictionaries(
    st.sampled_from(["a", "snapshots", "mean", "__metadata__"]),
    st.one_of(
        st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E8M0", "F4", "X"]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**62, 2**64]), max_size=3),
            "data_offsets": st.tuples(st.sampled_from([0, 4, 8, 2**40]), st.sampled_from([0, 4, 16, 32, 2**40])),
        }),
        st.dictionaries(st.text(max_size=3), st.text(max_size=3)), st.none(), st.integers(),
    ), max_size=2,
)  # fmt: skip


@examples(150)
def test_a_safetensors_file_with_any_header_is_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "expert_0.safetensors"

    def claim(case: tuple[dict[str, Any], int, int]) -> None:
        header, body, more = case
        text = json.dumps(header).encode()
        path.write_bytes((len(text) + more).to_bytes(8, "little", signed=True) + text + bytes(body))
        for read in (load_tensors, read_notes, lambda path: load_zca(path, "")):
            read_or_refused(lambda read=read: read(path))  # type: ignore[misc]

    with at_most(200):
        hold(
            count, claim, st.tuples(headers, st.sampled_from([0, 4, 16, 32]), st.sampled_from([0, 0, 0, 1, 2**40, -1]))
        )


@examples(80)
def test_a_damaged_transform_is_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "zca.safetensors"
    eye = torch.eye(4)

    def claim(case: tuple[dict[str, Tensor], dict[str, str]]) -> None:
        save_file(
            {name: part.clone(memory_format=torch.contiguous_format) for name, part in case[0].items()}, path, case[1]
        )
        read_or_refused(lambda: load_zca(path, "a"))

    parts: dict[str, st.SearchStrategy[Tensor]] = {
        "mean": st.one_of(tensors, st.just(torch.zeros(1, 2, 2))), "transform": st.one_of(tensors, st.just(eye)),
        "inverse": st.one_of(tensors, st.just(eye)),
    }  # fmt: skip
    notes = st.dictionaries(st.sampled_from(["sha256", "b"]), st.sampled_from(["a", "b"]))
    hold(count, claim, st.tuples(st.fixed_dictionaries({}, optional=parts), notes))


def expert_notes(**change: Any) -> dict[str, Any]:
    net = nn.Linear(2, 2)
    notes = ExpertNotes(dataset="d", zca="", parameters=parameters_of(net), first=0, last=1, settings={})
    return json.loads(notes.model_dump_json()) | change


@examples(80)
def test_experts_with_any_notes_are_read_or_refused(tmp_path: Path, count: int) -> None:
    path = expert_file(tmp_path, 0)
    whole = st.sampled_from([-1, 0, 1, 2**31, 2**70])
    change = st.fixed_dictionaries({}, optional={
        "first": whole, "last": whole, "zca": values.filter(lambda v: not isinstance(v, Tensor)), "more": st.none(),
        "parameters": st.lists(st.tuples(st.text(max_size=2), st.lists(whole, max_size=3)), max_size=2),
    })  # fmt: skip

    def claim(case: dict[str, Any]) -> None:
        save_file({"snapshots": torch.zeros(2, 6)}, path, {"expert": json.dumps(expert_notes(**case), default=str)})
        read_or_refused(lambda: ExpertBuffer(tmp_path).draw(0, 1))

    with at_most(200):
        claim({})
        assert ExpertBuffer(tmp_path).draw(0, 1).tolist() == [0.0] * 6
        hold(count, claim, change)


@examples(60)
def test_a_damaged_expert_or_teacher_is_read_or_refused(tmp_path: Path, count: int) -> None:
    net = nn.Linear(2, 2)
    start, end = member_files(tmp_path, 0, 1)
    state = {name: p.detach() for name, p in net.named_parameters()}
    save_file(state, start)
    teacher = start.read_bytes()
    expert = save({"snapshots": torch.zeros(2, 6)}, {"expert": json.dumps(expert_notes())})

    def claim(case: tuple[bytes, bytes]) -> None:
        end.write_bytes(case[0])
        read_or_refused(lambda: load_bank(tmp_path, 1, 1, net, torch.device("cpu")))
        expert_file(tmp_path, 0).write_bytes(case[1])
        read_or_refused(lambda: ExpertBuffer(tmp_path).draw(0, 1))

    hold(count, claim, st.tuples(damaged(teacher), damaged(expert)))


@examples(60)
def test_a_public_buffer_of_any_nesting_is_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "replay_buffer_0.pt"
    right = st.just(torch.ones(2))
    nested = st.recursive(st.one_of(right, right, values), lambda part: st.lists(part, max_size=3), max_leaves=12)

    def claim(case: Any) -> None:
        path.write_bytes(pth(case))
        read_or_refused(lambda: replayed(path, (("w", (2,)),)))

    hold(count, claim, nested)


@examples(60)
def test_a_damaged_export_is_read_or_refused(tmp_path: Path, count: int) -> None:
    parts = {"images": torch.rand(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    save_file(parts, tmp_path / "set.safetensors")
    text = json.dumps({"classes": 2, "sha256": "x", "mean": [0.0], "std": [1.0], "meta": {}, "zca": ""}).encode()

    def claim(case: tuple[bytes, bytes]) -> None:
        (tmp_path / "set.json").write_bytes(case[0])
        (tmp_path / "result.json").write_bytes(case[1])
        read_or_refused(lambda: load_export(tmp_path))
        read_or_refused(lambda: load_json(tmp_path / "result.json"))

    hold(count, claim, st.tuples(damaged(text), st.one_of(damaged(text), st.just(b"[" * 10**5))))


def test_a_state_s_second_name_keeps_its_ending() -> None:
    assert previous(Path("a/state.pth")) == Path("a/state.previous.pth")
    assert isinstance(Deed((math.sqrt, (4,))).__reduce__(), tuple)
