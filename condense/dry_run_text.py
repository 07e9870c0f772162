"""What a text run would do: every value and its source, the classes of each rank, memory and work; starts nothing."""

from collections.abc import Sequence

from condense.job import condense_folder
from condense.text_job import TextConfig, class_costs
from config import Resolved
from utils.ddp import environment_rank, environment_size
from utils.dry_run import print_classes, print_values
from utils.encoder import local_hidden_size, missing_encoder
from utils.utils_text import load_corpus


def dry_run(resolved: Resolved[TextConfig]) -> None:
    """Print the plan (rank 0)."""
    if environment_rank():
        return
    cfg, ranks = resolved.config, environment_size()
    print_values(resolved, condense_folder(cfg))
    counts, mean_tokens = class_counts(cfg)
    print_classes(class_costs(cfg.condense, cfg.network.max_length, cfg.dataset.batch_real, counts), cfg.debug, ranks)
    missing = missing_encoder(cfg.network)
    if missing:
        print(missing)
    estimate(cfg, counts, mean_tokens, ranks)


def class_counts(cfg: TextConfig) -> tuple[list[int], float]:
    """Training documents per class and their mean tokens; equal sizes where the data is absent."""
    d = cfg.dataset
    if d.data_dir is not None and not d.data_dir.exists():
        print(f"dataset.data_dir: {d.data_dir} is absent; classes of equal size ({d.batch_real} documents) are assumed")
        return [d.batch_real] * d.nclass, float(cfg.network.max_length)
    corpus = load_corpus(d, cfg.cache_dir)
    counts = [0] * d.nclass
    for labels in corpus.train.labels:
        for label in labels:
            counts[label] += 1
    words = sum(len(text.split()) for text in corpus.train.texts) / len(corpus.train)
    return counts, min(1.4 * words + 2, float(cfg.network.max_length))  # about 1.4 word pieces a word


def estimate(cfg: TextConfig, counts: Sequence[int], mean_tokens: float, ranks: int) -> None:
    """Print memory and work of one iteration, from shapes alone."""
    c, n = cfg.condense, cfg.network
    hidden = local_hidden_size(n)
    body = n.depth * 12 * hidden**2  # weights of the layers
    rows = -(-len(counts) // ranks) * c.ipc * n.max_length
    moments = {"sgd": 1, "adam": 2, "adamw": 2}[cfg.optimization.optimizer]
    data = rows * hidden * 4 * (2 + moments)
    bank = (2 * c.num_premodel + 2) * body * 4
    activations = min(c.token_budget, rows) * n.depth * hidden * 4 * 34
    real = sum(min(count, cfg.dataset.batch_real) for count in counts) * mean_tokens / c.refresh / ranks
    work = 2 * body * (real + 3 * rows * (1 + c.iter_calib))
    print(
        f"memory per rank, about: rows with gradient and optimiser {data / 1e9:.2f} GB, teachers {bank / 1e9:.2f} GB, "
        f"activations {activations / 1e9:.2f} GB; to lower it: num_premodel, token_budget, max_length"
    )
    print(
        f"work per rank and iteration, about: {real:.0f} real and {rows} synthetic tokens, {work / 1e12:.3f} TFLOP; "
        f"{c.niter} iterations"
    )
