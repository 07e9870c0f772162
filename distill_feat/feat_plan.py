"""What a run of feature labels would do: values, classes of each rank where ranks share them out, work, storage."""

from pathlib import Path
from typing import TypeVar

import torch

from condenser.feature_labels import image_equivalents, label_shape
from condenser.trajectory_condenser import TrajectoryConfig
from config import Resolved
from distill_feat.feat_job import FeatConfig
from utils.ddp import environment_rank, environment_size
from utils.dry_run import print_classes, print_values
from utils.image_networks import image_network

C = TypeVar("C", bound=FeatConfig)


def dry_run(resolved: Resolved[C], folder: Path, work: str) -> None:
    """Print the plan (rank 0); starts nothing."""
    if environment_rank():
        return
    cfg, f, c, d = resolved.config, resolved.config.feature, resolved.config.condense, resolved.config.dataset
    print_values(resolved, folder)
    if not isinstance(c, TrajectoryConfig):
        print_classes([1.0] * d.nclass, cfg.debug, environment_size())
    if d.absent:
        print(f"dataset.data_dir: {d.data_dir} is absent; nothing can be learned before it is there")
    shape = (d.channels, d.size, d.size)
    net = image_network(cfg.network, d.channels, d.size, d.nclass, 0, "dry run")
    print(f"iterations: {work}; {sum(p.numel() for p in net.parameters())} weights")
    soft, label = d.nclass if isinstance(c, TrajectoryConfig) and c.soft_labels else 0, tuple[int, ...]()
    if f is not None:
        with torch.no_grad():
            _, *rest = net.with_map(torch.zeros(2, *shape), f.layer_idx)[1].shape
        label = label_shape((rest[0], rest[1], rest[2]), f.form)
    parts = [f"soft labels of {soft} classes"] * bool(soft) + [f"F of shape {label}"] * bool(f)
    equal = image_equivalents(shape, label, f.n_feat if f else 0, c.ipc, f.scope if f else "sample", soft)
    if parts:
        print(f"storage: {c.ipc} images a class with {' and '.join(parts)} take as many bytes as {equal:.2f} images")
