"""Seconds per iteration of image condensation against a plain per-class loop, as ratios of the same rounds.

    python -m scripts.bench_ncfm_image                                       # CIFAR-shaped, 10 classes
    python -m scripts.bench_ncfm_image --classes 10 50 100 --batch_real 64   # our cost of a class, by their number

The plain loop is what the method's description says, class by class: augmented real images forward, decoded and
augmented synthetic ones forward, a projection each for cosine and sine, the textbook loss, a step of the whole tensor;
then calibration likewise. Same weights, images, augmentation, frequencies, dtype, threads, optimiser and allocator on
both sides; teachers frozen, real side without gradient. First the two are compared in float64. `compiled` computes the
real side through torch.compile, `bf16` so and in bfloat16. `exact` draws teacher, images and view at every iteration;
`cached` has the real side of its state at hand, as with `teacher_states: n` after the first n draws.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from condenser.Condenser_image import Condenser, ImageCondenseConfig
from condenser.optimization import OptimizationConfig, make_optimizer
from condenser.synthetic_image import decode
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
    time_side,
)
from utils.ddp import World, process_group
from utils.image_networks import ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.program import leave
from utils.streams import generator
from utils.teachers import TeacherBank, trainable
from utils.utils_image import ImageSet


@dataclass(frozen=True)
class Shapes:
    """Sizes of one benchmark."""

    width: int
    size: int
    classes: int
    batch_real: int
    ipc: int
    freqs: int
    budget: int


SMALL = Shapes(128, 32, 10, 1024, 10, 4096, 256)
TINY = Shapes(8, 8, 3, 6, 2, 32, 16)


def make(shapes: Shapes, world: World, dtype: torch.dtype, half: bool = False, compiled: bool = False) -> Condenser:
    """Our condenser on random images and random networks of these shapes."""
    s = shapes
    gen = generator(0, "benchmark images")
    count = s.classes * s.batch_real
    pixels = torch.randint(0, 256, (count, 3, s.size, s.size), generator=gen, dtype=torch.uint8)
    targets = torch.eye(s.classes).repeat_interleave(s.batch_real, 0)
    images = ImageSet(pixels, targets, s.size, Normaliser(torch.full((3,), 0.5), torch.full((3,), 0.25)))
    network = ImageNetworkConfig(width=s.width, depth=3)
    nets = [image_network(network, 3, s.size, s.classes, 0, "benchmark", i).to(world.device, dtype) for i in range(2)]
    bank = TeacherBank(*([{k: v.detach().clone() for k, v in trainable(net).items()}] for net in nets))
    settings = ImageCondenseConfig(
        niter=1, ipc=s.ipc, num_premodel=1, teacher_model_epoch=1, num_freqs=s.freqs, image_budget=s.budget,
        real_precision="bfloat16" if half else "float32", compile=compiled,
    )  # fmt: skip
    c = Condenser(
        nclass_list=[list(range(s.classes))], device=world.device, settings=settings, images=images.to(world.device),
        networks=(nets[0], nets[1]), bank=bank, batch_real=s.batch_real, seed=0, world=world, dataset="benchmark",
    )  # fmt: skip
    c.data = c.data.detach().to(dtype).requires_grad_()
    return c


def plain_side(c: Condenser, optimizer: torch.optim.Optimizer) -> Side:
    """The plain loop on a condenser's images."""
    ipc, net, final = c.settings.ipc, c.model_interval, c.model_final

    def synthetic(i: int) -> Tensor:
        rows = c.data[i * ipc : (i + 1) * ipc]
        return c.images.normaliser(decode(rows, c.settings.factor, c.settings.decode_type))

    def match(number: int, step: Step) -> float:
        set_teachers(c, number)
        t, total = frequencies_of(c, number)[0], 0.0
        for i, label in enumerate(c.classes):
            x = c.match_view(c.images.input(c.sampler.draw(label, number), c.device).to(c.data.dtype))
            with torch.no_grad():
                real = net(x).features[0]
            loss = c.settings.match_weight * textbook(real, net(c.match_view(synthetic(i))).features[0], t)
            loss.backward()
            step()
            total += float(loss.detach())
        return total

    def calibrate(number: int, step: Step) -> float:
        total = 0.0
        for i, label in enumerate(c.classes):
            logits = final(c.calib_view(synthetic(i))).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), label, device=c.device))
            loss.backward()
            step()
            total += float(loss.detach())
        return total

    return Side(c, optimizer, match, calibrate, plain=True)


def compare(world: World) -> float:
    """Largest relative difference between the two sides, in float64."""
    sides = []
    for make_side in (plain_side, ours):
        c = make(TINY, world, torch.float64)
        c.prepare(0)  # draws the views
        sides.append(make_side(c, torch.optim.SGD([c.data], lr=0.0)))
    return difference(*sides)


def start(side: str, shapes: Shapes, world: World) -> Side:
    """A side on its condenser, the images' optimiser being gradient descent with momentum."""
    c = make(shapes, world, torch.float32, half=side == "bf16", compiled=side in ("compiled", "bf16"))
    c.prepare(0)
    optimizer = make_optimizer(c.data, OptimizationConfig(optimizer="sgd", lr_img=0.01), 1e-6)
    return plain_side(c, optimizer) if side == "plain" else ours(c, optimizer)


def bf16_is_quick(device: torch.device) -> bool:
    """Whether the device computes in bfloat16."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def command_line() -> Parser:
    """Its options."""
    parser = bench_parser(__doc__, rounds=3)
    add = partial(parser.add_argument, type=positive, metavar="N")
    text = "classes; of several numbers, what a class costs at each"
    add("--classes", nargs="+", default=[SMALL.classes], help=f"{text} (default: {SMALL.classes})")
    add("--batch_real", default=SMALL.batch_real, help=f"real images of a class (default: {SMALL.batch_real})")
    parser.add_argument("--only", choices=SIDES, help="do one iteration of one side and print its peak memory")
    return parser


def main() -> int:
    """Print the table; exit status 1 if the two sides disagree."""
    parser = command_line()
    args = parser.parse_args()
    shapes = replace(SMALL, classes=args.classes[0], batch_real=args.batch_real)
    device = device_of(parser, args.device)
    if not args.only:  # first of all: a process inherits the peak of the one that starts it
        peaks = {side: peak_alone("scripts.bench_ncfm_image", side) for side in SIDES}
        print("peak memory, GB: " + ", ".join(f"{side} {value:.2f}" for side, value in peaks.items()), flush=True)
    with process_group(device) as world:
        if args.only:
            print(f"peak memory in GB, {args.only}: {peak(start(args.only, shapes, world)):.2f}")
            return 0
        if compare(world) > 1e-8:
            return 1
        print(f"{device}, {torch.get_num_threads()} threads: {shapes}", flush=True)
        if len(args.classes) > 1:
            cost_of_classes(args.classes, shapes, world)
            return 0
        names = (*SIDES, "compiled", "bf16") if bf16_is_quick(device) else (*SIDES, "compiled")
        rounds(args.rounds, {side: start(side, shapes, world) for side in names})
        if "bf16" not in names:
            print("bf16: not applicable, the processor has no bfloat16 instructions")
    return 0


def cost_of_classes(counts: list[int], shapes: Shapes, world: World) -> None:
    """Print our seconds a class and iteration for several numbers of classes."""
    for count in counts:
        side = start("ours", replace(shapes, classes=count), world)
        time_side(side, 1)
        taken = time_side(side, 2)
        print(f"{count} classes: {1000 * sum(taken.values()) / count:.1f} ms a class and iteration", flush=True)


if __name__ == "__main__":
    leave(main())
