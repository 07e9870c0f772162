"""Names: rows of the tables, and what the requirement calls data sets, networks and labels."""

from typing import Literal

from config import Option
from utils.image_readers import SUBSETS

RowName = Literal[
    "full", "distilled", "distilled_feature", "start", "start_feature", "random", "distilled_soft", "random_soft",
]  # fmt: skip
NAMES: dict[RowName, str] = {
    "full": "full data", "distilled": "learned, no F", "distilled_feature": "learned, with F",
    "start": "its start, no F", "start_feature": "its start, with F", "random": "random, equal bytes",
    "distilled_soft": "learned, soft labels", "random_soft": "random, soft labels, equal bytes",
}  # fmt: skip

IMAGENET = ("dataset.nclass=10", "dataset.size=128", "network.depth=5")
DATASETS = {
    "CIFAR10": ("dataset.dataset=cifar10", "dataset.nclass=10", "dataset.size=32", "network.depth=3"),
    "CIFAR100": ("dataset.dataset=cifar100", "dataset.nclass=100", "dataset.size=32", "network.depth=3"),
    "Tiny": ("dataset.dataset=tinyimagenet", "dataset.nclass=200", "dataset.size=64", "network.depth=4"),
    "ImageNet": ("dataset.dataset=imagenet", *IMAGENET),
}  # fmt: skip
TEN = {name: (f"dataset.dataset={name}", *IMAGENET) for name in SUBSETS}
MODELS = {"ConvNet": ("network.net_type=convnet", "network.depth=3")} | {
    f"ConvNetD{depth}": ("network.net_type=convnet", f"network.depth={depth}") for depth in range(1, 8)
}
POOLINGS = {"none": ("feature.form=map", "feature.pooling=avg")} | {
    pool: ("feature.form=channel", f"feature.pooling={pool}") for pool in ("avg", "max", "sum")
}
LAST = {name: ("feature.layer_idx=null",) for name in ("none", "None")}
# The requirement's flags that every program has.
DATA_OPTIONS = (
    Option("data_path", "dataset.data_dir", "path", "folder of the data set"),
    Option("dataset", "dataset.dataset", "value", "with its size, classes and depth", tuple(DATASETS), DATASETS),
    Option("subset", "dataset.dataset", "value", "ten classes of ImageNet, named after --dataset", tuple(TEN), TEN),
)
