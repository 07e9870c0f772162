"""Shares of work against the true optimum, devices by local rank, and a lone process as a world of one."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch

from config import ConfigError
from utils.ddp import World, assign, choose_device, distribute_class, process_group, sync_distributed_metric


def reuters_like() -> list[float]:
    """Costs of 90 classes as skewed as those of Reuters: thousands of documents down to one."""
    return [1 + 2877 / (i + 1) ** 1.45 for i in range(90)]


def dearest(parts: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    return max(sum(costs[i] for i in part) for part in parts)


def optimum(costs: Sequence[float], ranks: int) -> float:
    """Smallest load of the busiest rank over every possible assignment."""
    ways = product(range(ranks), repeat=len(costs))
    return min(max(sum(c for c, r in zip(costs, way, strict=True) if r == k) for k in range(ranks)) for way in ways)


@pytest.mark.parametrize("ranks", [1, 2, 6, 100])
def test_every_item_goes_to_exactly_one_rank(ranks: int) -> None:
    parts = assign(reuters_like(), ranks)
    assert len(parts) == ranks
    assert sorted(i for part in parts for i in part) == list(range(90))
    assert all(part == sorted(part) for part in parts)


@pytest.mark.parametrize("seed", range(5))
def test_busiest_rank_has_at_most_four_thirds_of_the_optimum(seed: int) -> None:
    costs = torch.randint(1, 30, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    for ranks in (2, 3):
        assert dearest(assign(costs, ranks), costs) <= (4 / 3 - 1 / (3 * ranks)) * optimum(costs, ranks)


def test_ninety_skewed_classes_are_even_over_six_ranks() -> None:
    costs = [min(cost, 256) for cost in reuters_like()]  # a step reads at most batch_real documents of a class
    assert dearest(assign(costs, 6), costs) / (sum(costs) / 6) < 1.05


def test_items_of_no_cost_spread_over_the_ranks() -> None:
    assert [len(part) for part in assign([0.0] * 12, 4)] == [3, 3, 3, 3]


@pytest.mark.parametrize(("nclass", "kept"), [(5, 5), (90, 10), (2000, 20)])
def test_debug_keeps_the_first_classes(nclass: int, kept: int) -> None:
    shares = [distribute_class(nclass, True, rank=rank, size=3) for rank in range(3)]
    assert sorted(c for share in shares for c in share) == list(range(kept))
    costs = [float(c) for c in range(nclass)]
    assert distribute_class(nclass, True, costs=costs) == list(range(kept))


def test_ranks_beyond_the_classes_idle() -> None:
    shares = [distribute_class(2, costs=[5.0, 1.0], rank=rank, size=4) for rank in range(4)]
    assert shares == [[0], [1], [], []]


def test_without_cuda_the_device_is_the_cpu_whatever_gpu_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == choose_device("0,1") == torch.device("cpu")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that shows four GPUs to the second of two local ranks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return monkeypatch


@pytest.mark.parametrize(("gpu", "index"), [(None, 1), ("", 1), ("3,2", 2), ("0, 3", 3)])
def test_gpu_lists_devices_by_local_rank(gpu: str | None, index: int, four_gpus: pytest.MonkeyPatch) -> None:
    assert choose_device(gpu) == torch.device("cuda", index)


@pytest.mark.parametrize(("gpu", "words"), [("0,x", "0,2,3"), ("0,4", "no device 4"), ("2", "2 processes share 1")])
def test_gpu_that_does_not_fit_is_refused(gpu: str, words: str, four_gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_device(gpu)


def test_a_lone_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rows = torch.arange(6.0).view(3, 2)
    with process_group(torch.device("cpu")) as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert world.main
        assert world.share([3.0, 1.0, 2.0]) == [0, 1, 2]
        assert world.sum(torch.tensor([2.0])).item() == 2
        assert (world.broadcast({"a": 1}), world.gather_values("b")) == ({"a": 1}, ["b"])
        gathered = world.gather_rows(rows, [[2, 0, 1]])
        assert sync_distributed_metric({"loss": 3.5, "count": 2.0}) == {"loss": 3.5, "count": 2.0}
    assert gathered is not None
    assert torch.equal(gathered[[2, 0, 1]], rows)
    assert not torch.distributed.is_initialized()
