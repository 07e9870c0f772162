"""What an image run would do: every value and its source, the classes of each rank, memory and work; starts nothing."""

from condense.image_job import ImageConfig, class_costs
from condense.job import condense_folder
from condenser.synthetic_image import samples_per_image
from config import Resolved
from utils.ddp import environment_rank, environment_size
from utils.dry_run import print_classes, print_values
from utils.image_networks import image_network


def dry_run(resolved: Resolved[ImageConfig]) -> None:
    """Print the plan (rank 0)."""
    if environment_rank():
        return
    cfg, ranks = resolved.config, environment_size()
    print_values(resolved, condense_folder(cfg))
    print_classes(class_costs(cfg), cfg.debug, ranks)
    d = cfg.dataset
    if d.absent:
        print(f"dataset.data_dir: {d.data_dir} is absent; {d.batch_real} images of every class are assumed")
    estimate(cfg, ranks)


def estimate(cfg: ImageConfig, ranks: int) -> None:
    """Print memory and work of one iteration, from shapes alone."""
    c, d = cfg.condense, cfg.dataset
    net = image_network(cfg.network, d.channels, d.size, d.nclass, 0, "dry run")
    weights = sum(p.numel() for p in net.parameters())
    rows = -(-d.nclass // ranks) * c.ipc
    moments = {"sgd": 1, "adam": 2, "adamw": 2}[cfg.optimization.optimizer]
    data = rows * d.channels * d.size**2 * 4 * (2 + moments)
    real, synthetic = d.nclass * d.batch_real / c.refresh / ranks, rows * samples_per_image(c.factor, c.decode_type)
    print(
        f"memory per rank, about: images with gradient and optimiser {data / 1e9:.3f} GB, teachers "
        f"{(2 * c.num_premodel + 2) * weights * 4 / 1e9:.3f} GB; to lower it: num_premodel, image_budget"
    )
    print(
        f"work per rank and iteration, about: {real:.0f} real images forward and {synthetic} synthetic ones forward "
        f"and backward {1 + c.iter_calib} times; {weights} weights; {c.niter} iterations"
    )
