"""Draws and batches."""

import torch

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
