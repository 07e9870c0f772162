"""The distillation benchmark compares equal things, and our step waits for no device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.bench_kd import Waits, compare, masked_loss, waits
from utils.ddp import World, process_group


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group(torch.device("cpu")) as world:
        yield world


def test_the_described_step_and_ours_are_equal_in_float64(world: World, tmp_path: Path) -> None:
    assert compare(world, tmp_path) <= 1e-10


def test_our_step_waits_for_no_device_and_the_described_one_for_every_sample(world: World, tmp_path: Path) -> None:
    found = waits(world, tmp_path)
    assert found["ours"] == found["kept logits"] == 0 and found["plain"] > 64


def test_every_way_to_read_a_value_on_the_host_is_counted() -> None:
    x = torch.arange(3.0)
    for read in (x[0].item, lambda: bool(x[0]), lambda: x[x > 1], x.nonzero, lambda: x.masked_select(x > 1)):
        with Waits() as counter:
            read()
        assert counter.count == 1


def test_the_described_masks_go_sample_after_sample_over_rows_that_go_region_after_region() -> None:
    """Two samples, two regions: row 1 is sample 1's whole image, and is compared to sample 0's."""
    teacher = torch.tensor([[2.0, 1, 0], [1.0, 2, 0], [1.0, 2, 0], [1.0, 2, 0]])  # right: yes, no, no, no
    student = torch.tensor([[0.0, 1, 2], [3.0, 1, 0], [0.0, 2, 1], [1.0, 0, 2]])
    z_t, z_s = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in (teacher, student))
    rows = ((z_t / 2).softmax(1) * ((z_t / 2).log_softmax(1) - (z_s / 2).log_softmax(1))).sum(1) * 4
    want = (rows[0] + rows[2] + rows[3]) / 3 + rows[1]  # sample 1 is wrong as a whole, as its two rows here
    torch.testing.assert_close(masked_loss(student, teacher, torch.tensor([0, 0]), 2.0), want)
