"""Seconds per iteration of text condensation against a plain per-class loop, as ratios of the same rounds.

    python -m scripts.bench_ncfm_text                                  # 20 Reuters-shaped classes, small encoder
    python -m scripts.bench_ncfm_text --shapes requirement             # BERT-base, 90 classes, 512 tokens: for a GPU

The plain loop is what the method's description says, class by class: real forward at padded length, synthetic forward,
a projection each for cosine and sine, the textbook loss, and a step of the whole tensor; then calibration likewise.
Same weights, documents, frequencies, dtype, threads, optimiser and allocator on both sides; teachers frozen, real side
without gradient. First the two are compared in float64. Ratios are printed for matching alone and for matching and
calibration. `exact` draws teacher and documents at every iteration; `cached` has the real side of its teacher state at
hand, as with `teacher_states: n` after the first n draws; `refresh 10` adds a tenth of building one.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from condenser.Condenser_text import CondenseConfig, Condenser
from condenser.optimization import OptimizationConfig, make_optimizer
from config.cli import Parser, positive
from scripts.versus import (
    SIDES,
    Side,
    Step,
    bench_parser,
    device_of,
    difference,
    frequencies_of,
    ours,
    peak,
    peak_alone,
    rounds,
    set_teachers,
    textbook,
)
from utils.ddp import World, process_group
from utils.encoder import EncoderFactory, TextInput
from utils.program import leave
from utils.streams import generator
from utils.teachers import TeacherBank, trainable
from utils.utils_text import TextSet

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
    vocab: int


SHAPES = {
    "tiny": Shapes(2, 32, 2, (1, 2), 16, 5, 8, 2, 32, 64, 2000),
    "small": Shapes(4, 256, 4, (2, 4), 64, 20, 256, 10, 1024, 2048, 2000),
    "requirement": Shapes(12, 768, 12, (3, 6, 9, 12), 512, 90, 256, 10, 4096, 65536, 30522),
}


def documents(shapes: Shapes, scaled: bool) -> TextSet:
    """Random tokens with Reuters' class sizes and lengths: log-normal, median 127, mean 170.

    They are cut at the longest input; `scaled` first shrinks them as the input is shrunk from 512, which keeps the
    share of padding that 512 positions have.
    """
    gen = generator(0, "benchmark documents")
    sizes = [*HEAD, *(max(1, round(75 * 0.94**i)) for i in range(shapes.classes))][: shapes.classes]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    lengths = 127 * torch.exp(0.764 * torch.randn(len(labels), generator=gen))  # mean / median = exp(0.764^2 / 2)
    if scaled:
        lengths *= shapes.length / 512
    lengths = lengths.long().clamp(4, shapes.length)
    flat = torch.randint(10, shapes.vocab, (int(lengths.sum()),), generator=gen, dtype=torch.int32)
    return TextSet(flat, lengths.cumsum(0) - lengths, lengths, F.one_hot(labels, shapes.classes).float(), 0)


def make(shapes: Shapes, world: World, dtype: torch.dtype, data: TextSet) -> Condenser:
    """Our condenser on a random BERT of these shapes."""
    from transformers import AutoModel, BertConfig

    settings = BertConfig(
        vocab_size=shapes.vocab, hidden_size=shapes.hidden, num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads, intermediate_size=4 * shapes.hidden, max_position_embeddings=shapes.length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # both sides get the same weights
        body = AutoModel.from_config(settings, attn_implementation="sdpa")
    factory = EncoderFactory(body, True, shapes.classes, "cls", shapes.matched)
    nets = tuple(factory.fresh(0, "benchmark", i).to(world.device, dtype) for i in range(2))
    bank = TeacherBank(*([{k: v.detach().clone() for k, v in trainable(net).items()}] for net in nets))
    condense = CondenseConfig(
        niter=1, ipc=shapes.ipc, num_premodel=1, teacher_model_epoch=1, init="random", decode_type="whole",
        num_freqs=shapes.freqs, token_budget=shapes.budget, match_weight=300.0,
    )  # fmt: skip
    return Condenser(
        nclass_list=[list(range(shapes.classes))], device=world.device, settings=condense, documents=data,
        networks=(nets[0], nets[1]), bank=bank, table=factory.word_table.to(dtype), frame=(1, 2),
        max_length=shapes.length,
        batch_real=shapes.batch_real, multilabel=True, seed=0, world=world, dataset="benchmark",
    )  # fmt: skip


def whole_blocks(c: Condenser) -> None:
    """Give the encoders back the blocks of transformers, which compute every row of the last layer."""
    nets: tuple[Any, Any] = (c.model_interval, c.model_final)
    for net in nets:
        blocks = net.blocks()
        whole = type(blocks[0])(net.body.config)
        whole.load_state_dict(blocks[-1].state_dict())
        blocks[-1] = whole.to(c.data).requires_grad_(False).eval()


def plain_match(c: Condenser, t: Tensor, number: int, step: Step) -> float:
    """Matching class by class on the condenser's rows at frequencies t [L, F, D]; sum of the losses."""
    ipc, total = c.settings.ipc, 0.0
    for i, label in enumerate(c.classes):
        where = slice(i * ipc, (i + 1) * ipc)
        x = c.documents.input(c.sampler.draw(label, number), c.device)
        room = c.max_length - x.tokens.shape[1]
        with torch.no_grad():
            real = c.model_interval(TextInput(F.pad(x.tokens, (0, room)), F.pad(x.mask, (0, room)))).features
        syn = c.model_interval(TextInput(c.data[where], c.row_mask[where].long().to(c.device))).features
        losses = [textbook(r, s, u) for r, s, u in zip(real, syn, t, strict=True)]
        loss = c.settings.match_weight * torch.stack(losses).mean()
        loss.backward()
        step()
        total += float(loss.detach())
    return total


def plain_calibrate(c: Condenser, step: Step) -> float:
    """Calibration class by class; sum of the losses."""
    ipc, total = c.settings.ipc, 0.0
    for i in range(len(c.classes)):
        where = slice(i * ipc, (i + 1) * ipc)
        logits = c.model_final(TextInput(c.data[where], c.row_mask[where].long().to(c.device))).logits
        targets = c.targets[where].to(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = c.settings.calib_weight * entropy.sum(1).mean()
        loss.backward()
        step()
        total += float(loss.detach())
    return total


def plain_side(c: Condenser, optimizer: torch.optim.Optimizer) -> Side:
    """The plain loop on a condenser's rows."""
    whole_blocks(c)

    def match(number: int, step: Step) -> float:
        set_teachers(c, number)
        return plain_match(c, frequencies_of(c, number), number, step)

    return Side(c, optimizer, match, lambda number, step: plain_calibrate(c, step), plain=True)


def compare(world: World) -> float:
    """Largest relative difference between the two sides, in float64."""
    sides = []
    for make_side in (plain_side, ours):
        c = make(SHAPES["tiny"], world, torch.float64, documents(SHAPES["tiny"], True))
        c.targets = c.targets.double()  # torch's cross-entropy computes partly in the precision of the targets
        sides.append(make_side(c, torch.optim.SGD([c.data], lr=0.0)))
    return difference(*sides)


def start(side: str, shapes: Shapes, world: World, data: TextSet) -> Side:
    """A side on its condenser with the optimiser of the requirement: gradient descent with momentum."""
    c = make(shapes, world, torch.float32, data)
    optimizer = make_optimizer(c.data, OptimizationConfig(optimizer="sgd", lr_img=0.01), 1e-6)
    return plain_side(c, optimizer) if side == "plain" else ours(c, optimizer)


def command_line() -> Parser:
    """Its options."""
    parser = bench_parser(__doc__, rounds=3)
    add = parser.add_argument
    names = [name for name in SHAPES if name != "tiny"]
    add("--shapes", choices=names, default="small", help="encoder and documents (default: small)")
    add("--classes", type=positive, metavar="N", help="classes (default: 20, with --shapes requirement 90)")
    add("--scaled", action="store_true", help="shrink document lengths with the input, from 512")
    parser.add_argument("--only", choices=SIDES, help="do one iteration of one side and print its peak memory")
    return parser


def main() -> int:
    """Print the table; exit status 1 if the two sides disagree."""
    parser = command_line()
    args = parser.parse_args()
    shapes = SHAPES[args.shapes]
    shapes = replace(shapes, classes=args.classes or shapes.classes)
    device = device_of(parser, args.device)
    if not args.only:  # first of all: a process inherits the peak of the one that starts it
        peaks = {side: peak_alone("scripts.bench_ncfm_text", side) for side in SIDES}
        print("peak memory, GB: " + ", ".join(f"{side} {value:.2f}" for side, value in peaks.items()), flush=True)
    with process_group(device) as world:
        data = documents(shapes, args.scaled).to(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        if args.only:
            print(f"peak memory in GB, {args.only}: {peak(start(args.only, shapes, world, data)):.2f}")
            return 0
        if compare(world) > 1e-8:
            return 1
        print(f"{device}, {torch.get_num_threads()} threads, {args.shapes}: {shapes}", flush=True)
        share = float(data.lengths.float().mean()) / shapes.length
        print(f"{len(data)} documents, {share:.0%} of the padded length on average", flush=True)
        rounds(args.rounds, {side: start(side, shapes, world, data) for side in SIDES})
    return 0


if __name__ == "__main__":
    leave(main())
