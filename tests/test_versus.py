"""Our batched, cached condensers against a plain loop over the classes, in float64."""

import pytest
import torch

from scripts import bench_ncfm_image, bench_ncfm_text
from utils.ddp import process_group


@pytest.mark.parametrize("bench", [bench_ncfm_text, bench_ncfm_image])
def test_loss_and_gradient_equal_those_of_a_loop_over_classes(bench) -> None:  # type: ignore[no-untyped-def]
    with process_group(torch.device("cpu")) as world:
        assert bench.compare(world) < 1e-8
