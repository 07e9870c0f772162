"""Seconds per iteration of text condensation against a plain per-class loop, as ratios of the same rounds.

    python -m scripts.bench_ncfm_text                                  # 20 Reuters-shaped classes, small encoder
    python -m scripts.bench_ncfm_text --shapes requirement             # BERT-base, 90 classes, 512 tokens: for a GPU

The plain loop is what the method's description says, class by class: real forward at padded length, synthetic forward,
a projection each for cosine and sine, the textbook loss, and a step of the whole tensor. Calibration, which costs both
sides the same arithmetic, is left out.
Same encoder, documents, frequencies, dtype, threads and allocator on both sides; teachers frozen, real side without
gradient. First the two are compared in float64. `cached` is refresh 10: one iteration in ten rebuilds the real side.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from condenser.Condenser_text import CondenseConfig, Condenser
from utils.ddp import World, choose_device, process_group
from utils.encoder import EncoderFactory, TextInput
from utils.streams import generator
from utils.teachers import TeacherBank, trainable
from utils.utils_text import TextSet

REFRESH = 10
# Training documents of Reuters' 20 largest classes.
HEAD = (2877, 1650, 538, 433, 389, 369, 347, 212, 197, 181, 140, 131, 125, 111, 101, 94, 87, 78, 75, 75)


@dataclass(frozen=True)
class Shapes:
    """Sizes of one benchmark."""

    layers: int
    hidden: int
    heads: int
    matched: tuple[int, ...]
    length: int
    classes: int
    batch_real: int
    ipc: int
    freqs: int
    budget: int
    vocab: int = 2000


SHAPES = {
    "tiny": Shapes(2, 32, 2, (1, 2), 16, 4, 8, 2, 32, 256),
    "small": Shapes(4, 256, 4, (2, 4), 64, 20, 256, 10, 1024, 8192),
    "requirement": Shapes(12, 768, 12, (3, 6, 9, 12), 512, 90, 256, 10, 4096, 65536),
}


def documents(shapes: Shapes) -> TextSet:
    """Random tokens in Reuters' proportions: its class sizes; log-normal lengths, median 127 of 512 positions."""
    gen = generator(0, "benchmark documents")
    sizes = [*HEAD, *(max(1, round(75 * 0.94**i)) for i in range(shapes.classes))][: shapes.classes]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    lengths = 127 * shapes.length / 512 * torch.exp(0.85 * torch.randn(len(labels), generator=gen))
    lengths = lengths.long().clamp(4, shapes.length)
    flat = torch.randint(10, shapes.vocab, (int(lengths.sum()),), generator=gen, dtype=torch.int32)
    return TextSet(flat, lengths.cumsum(0) - lengths, lengths, F.one_hot(labels, shapes.classes).float(), 0)


def make(shapes: Shapes, world: World, dtype: torch.dtype, refresh: int, data: TextSet) -> Condenser:
    """Our condenser on a random BERT of these shapes."""
    from transformers import AutoModel, BertConfig

    settings = BertConfig(
        vocab_size=shapes.vocab, hidden_size=shapes.hidden, num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads, intermediate_size=4 * shapes.hidden, max_position_embeddings=shapes.length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    body = AutoModel.from_config(settings, attn_implementation="sdpa")
    factory = EncoderFactory(body, True, shapes.classes, "cls", shapes.matched)
    nets = tuple(factory.fresh(0, "benchmark", i).to(world.device, dtype) for i in range(2))
    bank = TeacherBank(*([{k: v.detach().clone() for k, v in trainable(net).items()}] for net in nets))
    condense = CondenseConfig(
        niter=1, ipc=shapes.ipc, num_premodel=1, teacher_model_epoch=1, init="random", decode_type="whole",
        num_freqs=shapes.freqs, refresh=refresh, token_budget=shapes.budget, match_weight=300.0,
    )  # fmt: skip
    return Condenser(
        nclass_list=[list(range(shapes.classes))], device=world.device, settings=condense, documents=data,
        networks=(nets[0], nets[1]), bank=bank, table=factory.word_table.to(dtype), frame=(1, 2),
        max_length=shapes.length,
        batch_real=shapes.batch_real, multilabel=True, seed=0, world=world, dataset="benchmark",
    )  # fmt: skip


def textbook(real: Tensor, syn: Tensor, t: Tensor) -> Tensor:
    """Amplitude and phase loss as the paper writes it, each projection computed for its cosine and for its sine."""
    parts = []
    for x in (real, syn):
        parts += [torch.cos(x @ t.T).mean(0), torch.sin(x @ t.T).mean(0)]
    re, im, re_s, im_s = parts
    a, a_s = (re**2 + im**2).sqrt(), (re_s**2 + im_s**2).sqrt()
    amplitude, phase = (a - a_s) ** 2, 2 * (a * a_s - re * re_s - im * im_s)
    return (0.5 * amplitude + 0.5 * phase.clamp(min=1e-12)).sqrt().mean()


def plain_iteration(c: Condenser, optimizer: torch.optim.Optimizer | None, iteration: int) -> tuple[Tensor, float]:
    """One iteration class by class on the same rows; gradient of the matching loss [n, S, D] and its sum."""
    ipc, total = c.settings.ipc, 0.0
    kept = torch.zeros_like(c.data)
    gen = generator(c.seed, "frequencies", iteration, device=c.device)
    t = torch.randn(c.feature_shape, generator=gen, device=c.device).to(c.data.dtype)
    for label in c.classes:
        where = slice(label * ipc, (label + 1) * ipc)
        x = c.documents.input(c.sampler.draw(label, iteration), c.device)
        room = c.max_length - x.tokens.shape[1]
        padded = TextInput(F.pad(x.tokens, (0, room)), F.pad(x.mask, (0, room)))
        with torch.no_grad():
            real = c.model_interval(padded).features
        syn = c.model_interval(TextInput(c.data[where], c.mask[where].long().to(c.device))).features
        losses = [textbook(F.normalize(r), F.normalize(s), u) for r, s, u in zip(real, syn, t, strict=True)]
        loss = c.settings.match_weight * torch.stack(losses).mean()
        total += float(loss.detach())
        (gradient,) = torch.autograd.grad(loss, c.data)
        kept += gradient
        if optimizer:
            c.data.grad = gradient
            optimizer.step()
    return kept, total


def compare(world: World) -> float:
    """Largest relative difference of loss and gradient, ours against the plain loop, in float64."""
    c = make(SHAPES["tiny"], world, torch.float64, 1, documents(SHAPES["tiny"]))
    c.prepare(0)
    ours = c.match().total
    gradient = c.data.grad.clone() if c.data.grad is not None else torch.zeros_like(c.data)
    expected, total = plain_iteration(c, None, 0)
    return max(abs(ours - total) / total, float((gradient - expected).norm() / expected.norm()))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(device: torch.device) -> float:
    """Peak memory in GB since the last call on a GPU; of the process so far on the CPU."""
    if device.type == "cuda":
        value = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return value
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def ours(c: Condenser, optimizer: torch.optim.Optimizer) -> None:
    """Our matching step, the real side being at hand."""
    optimizer.zero_grad()
    c.match()
    optimizer.step()


def time_side(side: str, c: Condenser, optimizer: torch.optim.Optimizer, number: int) -> dict[str, float]:
    """Seconds of one iteration of a side; for `cached` the rebuild of the real side and an iteration without it too."""
    if side == "plain":
        return {"plain": seconds(lambda: plain_iteration(c, optimizer, number), c.device)}
    build = seconds(lambda: c.prepare(number * c.settings.refresh), c.device)
    steady = seconds(lambda: ours(c, optimizer), c.device)
    if side == "exact":
        return {"exact": build + steady}
    return {"cached": steady + build / REFRESH, "steady": steady, "build": build}


def main() -> int:
    """Print the table; exit status 1 if the two sides disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[name for name in SHAPES if name != "tiny"], default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("plain", "exact", "cached"), help="time one side alone, for its peak memory")
    args = parser.parse_args()
    shapes = SHAPES[args.shapes]
    with process_group(choose_device(None)) as world:
        torch.backends.cuda.matmul.allow_tf32 = True
        if args.only is None:
            torch.backends.cuda.matmul.allow_tf32 = False
            difference = compare(world)
            torch.backends.cuda.matmul.allow_tf32 = True
            print(f"float64, ours against the plain loop: relative difference {difference:.1e}", flush=True)
            if difference > 1e-8:
                return 1
        data = documents(shapes).to(world.device)
        exact, cached = (make(shapes, world, torch.float32, refresh, data) for refresh in (1, REFRESH))
        optimizers = {c: torch.optim.Adam([c.data], lr=1e-3) for c in (exact, cached)}
        print(f"{world.device}, {torch.get_num_threads()} threads, {args.shapes}: {shapes}", flush=True)
        taken: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        peak(world.device)
        for number in range(args.rounds + 1):  # the first round warms up
            found: dict[str, float] = {}
            for side, condenser in (("plain", exact), ("exact", exact), ("cached", cached)):
                if args.only in (None, side):
                    found |= time_side(side, condenser, optimizers[condenser], number)
                    memory[side] = peak(world.device)
            print(f"round {number}: " + ", ".join(f"{k} {v:.3f} s" for k, v in found.items()), flush=True)
            if number:
                for name, value in found.items():
                    taken.setdefault(name, []).append(value)
        print("median s/iteration: " + ", ".join(f"{k} {statistics.median(v):.3f}" for k, v in taken.items()))
        for name in ("exact", "cached", "steady"):
            if args.only is None:
                ratios = [a / b for a, b in zip(taken["plain"], taken[name], strict=True)]
                print(f"plain / {name}: {statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]")
        print("peak memory, GB: " + ", ".join(f"{side} {value:.2f}" for side, value in memory.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
