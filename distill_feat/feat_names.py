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
    Option("dataset", "dataset.dataset", "value", "data set with size, classes and depth", tuple(DATASETS), DATASETS),
    Option("subset", "dataset.dataset", "value", "ten classes of ImageNet, named after --dataset", tuple(TEN), TEN),
)
LOADED = ("condense.init=load", "condense.load_path={}")
# Those that every method with feature labels has.
OPTIONS = (
    *DATA_OPTIONS,
    Option("model", "network.net_type", "value", "kind of network, named after --dataset", expands=MODELS),
    Option("ipc", "condense.ipc", "value", "images to learn per class"),
    Option("init", "condense.init", "value", "where they start; or the file of a saved set", or_path=LOADED),
    Option("load_path", "condense.load_path", "path", "a saved set for --init load"),
    Option("learn_images", "condense.learn_images", "flag", "learn the images, not only F"),
    Option("lr_img", "condense.lr_img", "value", "step size of the images"),
    Option("aug_type", "condense.aug_type", "value", "DSA's operations, as in color/crop/cutout/flip/scale/rotate"),
    Option("generate_pretrained", "generate_pretrained", "flag", "only write the set as it starts"),
    Option("lbd", "feature.lbd", "value", "weight of the features' squared error"),
    Option("lbd_contrast", "feature.lbd_contrast", "value", "weight of the labels' contrast"),
    Option("feat_lbd", "feature.feat_lbd", "value", "weight of CE(C(F), y)"),
    Option("lr_feat", "feature.lr_feat", "value", "step size of feature labels"),
    Option("feat_opt", "feature.feat_opt", "value", "their optimiser", ("sgd", "adam")),
    Option("pooling", "feature.pooling", "value", "none: F is the map, else a channel", tuple(POOLINGS), POOLINGS),
    Option("layer_idx", "feature.layer_idx", "value", "block whose map is labelled, 1 = the first", expands=LAST),
    Option("n_feat", "feature.n_feat", "value", "labels of a sample"),
    Option("use_feature", "feature.use_feature", "value", "of several labels, what is used", ("mean", "random")),
    Option("batch_invariant", "evaluation.batch_invariant", "value", "same bits always", ("off", "eval", "train")),
    Option("tta", "evaluation.tta", "flag", "test with views, too"),
    Option("tta_mode", "evaluation.tta_mode", "value", "views to test with: none, hflip, fivecrop, hflip5 or shift"),
    Option("eval_it", "condense.val_every", "value", "iterations between evaluations on validation"),
    Option("Iteration", "condense.niter", "value", "iterations"),
    Option("num_exp", "num_exp", "value", "sets to learn, each from its own seed, counted from seed"),
    Option("num_eval", "evaluation.repeat", "value", "students of a row and set"),
)  # fmt: skip
