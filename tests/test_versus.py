"""The two sides of every benchmark compute the same: losses and gradients in float64, before anything is timed."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from scripts import bench_dc, bench_ncfm_image, bench_ncfm_text, bench_trajectory
from utils.ddp import World, process_group


@pytest.mark.parametrize(
    "compare",
    [bench_ncfm_text.compare, bench_ncfm_image.compare, bench_dc.compare, bench_trajectory.compare],
)
def test_both_sides_have_the_same_gradients(compare: Callable[[World], float]) -> None:
    with process_group(torch.device("cpu")) as world:
        assert compare(world) < 1e-8


def test_operations_of_a_batched_step_do_not_grow_with_the_classes() -> None:
    with process_group(torch.device("cpu")) as world:
        few, many = (bench_dc.operations(bench_dc.Shapes(8, 8, n, 2, 4), world) for n in (2, 10))
    assert few == many


@pytest.mark.slow
def test_the_memory_of_a_student_is_estimated_to_a_fifth() -> None:
    words = [sys.executable, "-m", "scripts.bench_trajectory", "--device", "cpu", "--memory_budget", "1", "--only"]
    for side in ("exact", "exact_kept"):
        done = subprocess.run([*words, side], check=True, capture_output=True, text=True)
        found, estimate = (float(word) for word in re.findall(r"([\d.]+) GB", done.stdout))
        assert found == pytest.approx(estimate, rel=0.2)


@pytest.mark.slow
def test_compiled_condenser_embeds_the_real_side_alike() -> None:
    shapes = bench_ncfm_image.Shapes(32, 16, 3, 6, 2, 32, 16)  # wide enough for Winograd's convolution
    with process_group(torch.device("cpu")) as world:
        plain, compiled = (bench_ncfm_image.make(shapes, world, torch.float64, compiled=c) for c in (False, True))
        for c in (plain, compiled):
            c.prepare(0)
            c.match()
    a, b = plain.kept[0].means, compiled.kept[0].means
    assert a is not None and b is not None
    torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(compiled.data.grad, plain.data.grad, rtol=1e-8, atol=1e-10)
