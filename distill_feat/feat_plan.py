"""What a run of feature labels would do: values, the classes of each rank, iterations, storage; starts nothing."""

from pathlib import Path
from typing import TypeVar

import torch

from condenser.feature_labels import image_equivalents, label_shape
from config import Resolved
from distill_feat.feat_job import FeatConfig
from utils.ddp import environment_rank, environment_size
from utils.dry_run import print_classes, print_values
from utils.image_networks import image_network

C = TypeVar("C", bound=FeatConfig)


def dry_run(resolved: Resolved[C], folder: Path, work: str) -> None:
    """Print the plan (rank 0)."""
    if environment_rank():
        return
    cfg, f, ipc = resolved.config, resolved.config.feature, resolved.config.condense.ipc
    print_values(resolved, folder)
    print_classes([1.0] * cfg.dataset.nclass, cfg.debug, environment_size())
    d = cfg.dataset
    if d.absent:
        print(f"dataset.data_dir: {d.data_dir} is absent; nothing can be learned before it is there")
    shape = (d.channels, d.size, d.size)
    net = image_network(cfg.network, d.channels, d.size, d.nclass, 0, "dry run")
    print(f"iterations: {work}; {sum(p.numel() for p in net.parameters())} weights")
    if f is not None:
        with torch.no_grad():
            _, *rest = net.with_map(torch.zeros(2, *shape), f.layer_idx)[1].shape
        label = label_shape((rest[0], rest[1], rest[2]), f.form)
        equal = image_equivalents(shape, label, f.n_feat, ipc, f.scope)
        print(f"storage: {ipc} images a class with F of shape {label} take as many bytes as {equal:.2f} images")
