"""Our step of DC with feature labels against a plain per-class loop as published, on random CIFAR-size images.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m scripts.bench_dc --device cpu --rounds 5

One outer step learns images and map labels of all classes. The plain loop, class after class: real images forward and
the gradient of every parameter, cloned; synthetic images forward, gradient with its graph, distance; for the labels
once more, logits and features by a pass each; one backward pass through everything at the end. Both sides have the
same network, images and labels, threads, dtype and allocator; first their gradients are compared in float64. Then the
inner loop at 10 images a class: epochs on the set, against a DataLoader and an optimiser. Last, dispatched operations.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from condenser.feature_labels import FeatureConfig
from condenser.gradient_condenser import GradientCondenser, GradientConfig
from condenser.gradient_matching import gradient_distance
from condenser.synthetic_set import SyntheticSet
from config.cli import Parser
from scripts.versus import bench_parser, device_of, seconds
from utils.ddp import World, process_group
from utils.image_networks import ImageNetwork, ImageNetworkConfig, image_network
from utils.normaliser import Normaliser
from utils.program import leave
from utils.streams import generator
from utils.utils_image import ImageSet


@dataclass(frozen=True)
class Shapes:
    """Sizes of one benchmark."""

    width: int = 128
    size: int = 32
    classes: int = 10
    ipc: int = 10
    batch_real: int = 256


LBD = 0.1


def make(s: Shapes, world: World, dtype: torch.dtype, labelled: bool, batched: bool = False) -> GradientCondenser:
    """Our condenser on random images."""
    gen = generator(0, "benchmark images")
    count = s.classes * s.batch_real
    pixels = torch.randint(0, 256, (count, 3, s.size, s.size), generator=gen, dtype=torch.uint8)
    targets = torch.eye(s.classes, dtype=dtype).repeat_interleave(s.batch_real, 0)
    norm = Normaliser(torch.full((3,), 0.5, dtype=dtype), torch.full((3,), 0.25, dtype=dtype))
    owner = torch.arange(s.classes).repeat_interleave(s.ipc)
    side = s.size // 8
    labels = torch.randn(1, len(owner), s.width, side, side, generator=gen).to(dtype)
    start = SyntheticSet(
        torch.rand(len(owner), 3, s.size, s.size, generator=gen).to(dtype), torch.eye(s.classes, dtype=dtype)[owner],
        owner, None, {}, labels, norm,
    )  # fmt: skip

    def network(i: int) -> ImageNetwork:
        return image_network(ImageNetworkConfig(width=s.width), 3, s.size, s.classes, 0, "benchmark", i).to(dtype)

    return GradientCondenser(
        nclass_list=[list(range(s.classes))], settings=GradientConfig(ipc=s.ipc, batched=batched),
        feature=FeatureConfig(lbd=LBD, lbd_contrast=0.0) if labelled else None,
        images=ImageSet(pixels, targets, s.size, norm).to(world.device), start=start, network=network,
        map_shape=(s.width, side, side), batch_real=s.batch_real, seed=0, world=world, meta={},
    )  # fmt: skip


def plain_step(c: GradientCondenser, net: ImageNetwork, key: int, labelled: bool, passes: int) -> None:
    """The published loop: gradients of images and labels, then a step of each."""
    ipc, total = c.settings.ipc, torch.zeros((), device=c.data.device)
    parameters, encoder = list(net.parameters()), [p for n, p in net.named_parameters() if not n.startswith("head.")]
    for i, label in enumerate(c.classes):
        y_real = torch.full((c.sampler.batch,), label, device=c.data.device)
        real = torch.autograd.grad(F.cross_entropy(net(c.real([label], key)[0]).logits, y_real), parameters)
        real = tuple(g.detach().clone() for g in real)
        x, y = c.data[i * ipc : (i + 1) * ipc], torch.full((ipc,), label, device=c.data.device)
        syn = torch.autograd.grad(F.cross_entropy(net(x).logits, y), parameters, create_graph=True)
        total = total + distance(syn, real)
        if labelled and c.labels is not None:
            rows = c.labels[i * ipc : (i + 1) * ipc, 0]
            if passes == 2:
                logits, maps = net(x.detach()).logits, net.with_map(x.detach())[1]
            else:
                output, maps = net.with_map(x.detach())
                logits = output.logits
            loss = F.cross_entropy(logits, y) + LBD * F.mse_loss(maps, rows)
            syn = torch.autograd.grad(loss, encoder, create_graph=True)
            total = total + distance(syn, real[: len(encoder)])
    total.backward()
    c.image_optimizer.step()
    c.data.grad = None
    if c.labels is not None:
        c.label_optimizer.step()
        c.labels.grad = None


def distance(syn: Any, real: Any) -> Tensor:
    """Published distance of one class's gradients."""
    return gradient_distance([g[None] for g in syn], [g[None] for g in real], "ours").sum()


def compare(world: World) -> float:
    """Largest relative difference of the learned rows between the two sides after a step, in float64, printed."""
    tiny, worst = Shapes(8, 8, 3, 4, 6), 0.0
    for batched in (False, True):
        sides = [make(tiny, world, torch.float64, labelled=True, batched=batched) for _ in range(2)]
        before = [part.own.detach().clone() for part in sides[0].learned.values()]
        net = sides[0].network(0).eval()
        plain_step(sides[0], net, 0, labelled=True, passes=2)
        sides[1].match(net, 0)
        ends = [[part.own.detach() for part in side.learned.values()] for side in sides]
        for name, start, plain, mine in zip(sides[0].learned, before, *ends, strict=True):
            apart = float((plain - mine).norm() / (plain - start).norm())
            mode = "batched" if batched else "tiled"
            print(f"float64, {mode}: relative difference of the step of {name} {apart:.1e}")
            worst = max(worst, apart)
    return worst


class Operations(TorchDispatchMode):
    """Counts dispatched operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One more."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(s: Shapes, world: World) -> int:
    """Dispatched operations of one batched step."""
    c = make(s, world, torch.float32, labelled=True, batched=True)
    net = c.network(0).eval()
    with Operations() as counter:
        c.match(net, 0)
    return counter.count


def inner_loops(s: Shapes, world: World) -> dict[str, Callable[[], object]]:
    """Ten epochs on the set: ours, and a DataLoader with torch's optimiser and separate passes for logits and maps."""
    c = make(s, world, torch.float32, labelled=True)
    net = c.network(0).to(world.device)
    labels = c.labels if c.labels is not None else c.data
    rows = TensorDataset(c.data.detach().cpu(), c.targets.argmax(1).cpu(), labels[:, 0].detach().cpu())

    def plain() -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.0)
        for _ in range(10):
            for x, y, label in DataLoader(rows, batch_size=256, shuffle=True):
                x, y, label = x.to(world.device), y.to(world.device), label.to(world.device)
                loss = F.cross_entropy(net(x).logits, y) + LBD * F.mse_loss(net.with_map(x)[1], label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return {"plain": plain, "ours": lambda: c.train(net, 10, 0)}


def ratios(title: str, sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> None:
    """Time the sides in turn after a round to warm up; print medians, and `plain` over each."""
    taken = [{name: seconds(run, device) for name, run in sides.items()} for _ in range(rounds + 1)][1:]
    for name in sides:
        own = [t["plain"] / t[name] for t in taken]
        spread = f"{statistics.median(own):.2f} [{min(own):.2f} - {max(own):.2f}]"
        print(f"{title}, {name}: {statistics.median(t[name] for t in taken):.3f} s, plain / this {spread}", flush=True)


def command_line() -> Parser:
    """Its options."""
    return bench_parser(__doc__, rounds=5)


def main() -> int:
    """Print the numbers; exit status 1 if the two sides disagree."""
    parser = command_line()
    args = parser.parse_args()
    device = device_of(parser, args.device)
    shapes = Shapes()
    with process_group(device) as world:
        if compare(world) > 1e-9:
            return 1
        print(f"{device}, {torch.get_num_threads()} threads: {shapes}", flush=True)
        for labelled, passes in ((True, 2), (False, 1)):
            c = make(shapes, world, torch.float32, labelled)
            net = c.network(0).to(device).eval()
            sides: dict[str, Callable[[], object]] = {
                "plain": partial(plain_step, c, net, 0, labelled, passes),
                "ours": partial(c.match, net, 0),
            }
            ratios("images and labels" if labelled else "images only", sides, args.rounds, device)
        ratios("ten epochs of the inner loop", inner_loops(shapes, world), args.rounds, device)
        few, many = (operations(replace(Shapes(8, 8, 2, 2, 4), classes=n), world) for n in (2, 10))
        print(f"dispatched operations of a batched step: {few} at 2 classes, {many} at 10")
    return 0


if __name__ == "__main__":
    leave(main())
