"""Draws, batches and shares of work."""

import torch

from utils.ddp import assign, distribute_class
from utils.sampling import ClassSampler, buckets, training_batch
from utils.streams import generator, stream_seed


def test_a_class_is_seen_whole_in_each_epoch_and_never_twice_in_a_draw() -> None:
    members = [torch.arange(23), torch.tensor([5]), torch.arange(10, 18)]
    sampler = ClassSampler(members, batch=8, seed=3)
    for epoch in range(3):
        draws = [sampler.draw(0, epoch * 3 + turn) for turn in range(3)]
        assert torch.cat(draws).unique().tolist() == members[0].tolist()
        assert all(len(d.unique()) == 8 for d in draws)
    assert sampler.draw(0, 0).tolist() != sampler.draw(0, 3).tolist()
    assert sampler.draw(1, 7).tolist() == [5]
    assert sampler.draw(2, 4).tolist() == members[2].tolist()


def test_training_batches_cover_an_epoch_and_depend_on_their_name_only() -> None:
    lengths = torch.randint(3, 40, (50,), generator=torch.Generator().manual_seed(0))
    epoch = [training_batch(lengths, 10, step, 7, 1) for step in range(5)]
    assert torch.cat(epoch).sort().values.tolist() == list(range(50))
    assert training_batch(lengths, 10, 3, 7, 1).tolist() == epoch[3].tolist()
    assert training_batch(lengths, 10, 3, 8, 1).tolist() != epoch[3].tolist()


def test_buckets_keep_the_budget_and_lose_nothing() -> None:
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    parts = buckets(lengths, 256)
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert all(len(part) * max(lengths[i] for i in part) <= 256 for part in parts)


def test_streams_differ_by_name_and_not_by_order() -> None:
    assert stream_seed(0, "a", 1, 2) != stream_seed(0, "a", 2, 1)
    first = torch.randn(3, generator=generator(0, "a"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(3, generator=generator(0, "a")))


def test_classes_are_balanced_by_cost_within_four_thirds() -> None:
    costs = [min(256, round(2877 / (i + 1) ** 1.45) + 1) for i in range(90)]
    parts = assign(costs, 6)
    loads = [sum(costs[i] for i in part) for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(90))
    assert max(loads) <= 4 / 3 * max(sum(costs) / 6, max(costs))
    assert max(loads) / (sum(costs) / 6) < 1.1


def test_more_ranks_than_classes_leaves_ranks_idle() -> None:
    parts = [distribute_class(3, rank=r, size=5) for r in range(5)]
    assert sorted(c for part in parts for c in part) == [0, 1, 2]
    assert sum(not part for part in parts) == 2


def test_debug_keeps_ten_classes_of_ninety() -> None:
    assert distribute_class(90, debug=True) == list(range(10))


def test_training_batches_are_whole_where_the_size_does_not_divide_the_set() -> None:
    lengths = torch.arange(3, 26)  # 23 documents
    for epoch in range(3):
        drawn = [training_batch(lengths, 8, 3 * epoch + turn, 0) for turn in range(3)]
        assert torch.cat(drawn).unique().tolist() == list(range(23))
        assert all(len(ids.unique()) == 8 for ids in drawn)
    assert training_batch(lengths, 100, 5, 0).sort().values.tolist() == list(range(23))
    assert training_batch(torch.tensor([4]), 8, 3, 0).tolist() == [0]


def test_a_document_beyond_the_budget_is_a_bucket_of_its_own() -> None:
    assert buckets([50, 3, 40, 3], 10) == [[1, 3], [2], [0]]
    assert buckets([], 10) == []
