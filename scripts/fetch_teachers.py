"""Fetch the public CIFAR-100 teachers and convert them to ours.

    python -m scripts.fetch_teachers resnet32x4 wrn_40_2 --url MIRROR/cifar_teachers.tar

Links are tried in order: an archive of all teachers, then (--single) one file a teacher. A file is taken if its sha256
is the pinned one; a teacher without a pin, if it fits the network in every name and shape, and its sha256 is said. The
result is save/models/NAME_vanilla/NAME.safetensors, where students look.
"""

import hashlib
import logging
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from config import ConfigError
from config.cli import Parser
from utils.checkpoint import atomic_write, save_tensors
from utils.downloads import length, receive
from utils.kd_networks import kd_network, load_public
from utils.run_folder import REPOSITORY

ARCHIVES = ("https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar",)
SINGLES = ("http://shape2prog.csail.mit.edu/repo/{}_vanilla/ckpt_epoch_240.pth",)  # dead since 2023
TEACHERS = ("resnet56", "resnet110", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50")
PINS = {"resnet32x4": "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"}
FILE = "ckpt_epoch_240.pth"
log = logging.getLogger("distill_lab")


def download(urls: Sequence[str], target: Path) -> Path:
    """`target` from the first link that gives it, a part of it resumed. Raises ConfigError with every failure."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, failures = target.with_name(f"{target.name}.part"), list[str]()
    for url in urls:
        while reason := receive(url, part, start := length(part)):
            if length(part) <= start:  # no further byte
                break
        if not reason:
            return part.replace(target)
        failures.append(f"{url} ({reason})")
        log.info(failures[-1])
    raise ConfigError(
        f"{target.name}: cannot be fetched from {', '.join(failures)}: with a network run the same command again, "
        f"without one put the file at {target}, or train the teachers (config/kd/cifar100/vanilla)"
    )


def member(archive: Path, name: str) -> bytes:
    """A teacher's file in the archive. Raises ConfigError where there is none."""
    try:
        with tarfile.open(archive) as file:
            found = next((m for m in file if m.isfile() and m.name.endswith(f"{name}_vanilla/{FILE}")), None)
            data = found and file.extractfile(found)
            if data:
                return data.read()
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{archive}: not a tar archive ({error}): remove it") from error
    raise ConfigError(f"{archive}: holds no {name}_vanilla/{FILE}: take another archive with --url")


def take(name: str, data: bytes, folder: Path) -> Path:
    """The converted file of a teacher in `folder`. Raises ConfigError for what is not that teacher."""
    found = hashlib.sha256(data).hexdigest()
    if name in PINS and found != PINS[name]:
        raise ConfigError(f"{name}: its sha256 is {found}, not {PINS[name]}: take another link with --url")
    raw, target = folder / FILE, folder / f"{name}.safetensors"
    atomic_write(raw, data)
    net = kd_network(name, 100, 3, 32, 0, "fetched teacher")
    load_public(name, raw, net)
    save_tensors(target, dict(net.state_dict()), {"sha256": found})
    raw.unlink()
    log.info(f"{target}: sha256 of the public file {found}{'' if name in PINS else ' (not pinned: note it)'}")
    return target


def command_line() -> Parser:
    """Its options."""
    parser, save = Parser(__doc__), REPOSITORY / "save" / "models"
    parser.add_argument(
        "names", nargs="*", default=TEACHERS, metavar="NAME", help=f"{', '.join(TEACHERS)} (default: all)"
    )
    parser.add_argument(
        "--save", type=Path, metavar="DIR", default=save, help="folder of all teachers (default: save/models)"
    )
    parser.add_argument("--url", action="append", default=[], metavar="URL", help="an archive to try first")
    parser.add_argument("--single", action="store_true", help="take a file a teacher instead of the archive")
    return parser


def main() -> int:
    """Exit status: 1 if a teacher could not be had."""
    given = command_line().parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for name in given.names:
        folder = given.save / f"{name}_vanilla"
        if (folder / f"{name}.safetensors").exists():
            log.info(f"{name}: there already")
            continue
        try:
            if given.single:
                data = download([url.format(name) for url in SINGLES], folder / f"{FILE}.fetched").read_bytes()
            else:
                data = member(download([*given.url, *ARCHIVES], given.save / "cifar_teachers.tar"), name)
            take(name, data, folder)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
