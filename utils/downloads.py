"""Files and data sets fetched on first use: resumed, checked, unpacked without trust; one process at a time."""

import fcntl
import hashlib
import logging
import ssl
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from config import ConfigError
from utils.progress import Progress

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16
NETWORK = (URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError)  # other OSErrors are the disk's
log = logging.getLogger("distill_lab")


@dataclass(frozen=True)
class Archive:
    """A data set's links (mirrors behind the official one), the md5 of its archive, the folder in it."""

    urls: tuple[str, ...]
    md5: str
    folder: str


ARCHIVES = {
    "cifar10": Archive(
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
        ),
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
    ),
    "cifar100": Archive(
        (
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
        ),
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
    ),
    "cub200": Archive(
        (
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz",
        ),
        "97eceeb196236b17998738112f37df78",
        "CUB_200_2011",
    ),
}


def fetch_dataset(name: str, root: Path) -> Path:
    """The folder of a data set below `root`; cifar10, cifar100 and cub200 are fetched if absent. Raises ConfigError."""
    if name not in ARCHIVES:
        return root / name
    known = ARCHIVES[name]
    folder = root / known.folder
    for place in (folder, root / name / known.folder):
        if place.is_dir():
            return place
    with alone(folder):
        if not folder.is_dir():  # another process may have made it meanwhile
            unpack(fetch(known.urls, root / known.urls[0].rsplit("/", 1)[1], known.md5), folder)
    return folder


def fetch(urls: Sequence[str], target: Path, checksum: str) -> Path:
    """`target`, from the first link that gives the file of that md5 or sha256; what is there of it is resumed.

    Raises ConfigError with the file, every link and its failure, and the target.
    """
    part, failures = target.with_name(f"{target.name}.part"), []
    with alone(target):
        if target.is_file():
            if intact(target, checksum):
                return target
            raise ConfigError(f"{target}: its checksum is not {checksum}: remove it, then run the same command again")
        for url in urls:
            reason = complete(url, part, checksum)
            if not reason:
                return part.replace(target)
            log.info(f"{url}: {reason}")
            failures.append(f"{url} ({reason})")
    raise ConfigError(
        f"{target.name}: cannot be fetched from {', '.join(failures)}: with a network run the same command again, "
        f"without one put the file at {target}"
    )


def complete(url: str, part: Path, checksum: str) -> str:
    """Try the link for as long as each try brings bytes; "" once `part` is the file of that checksum, else why not."""
    own = False  # whether all of the part came from this link
    while True:
        start = length(part)
        own |= not start
        reason = receive(url, part, start)
        if reason:
            if length(part) <= start:
                return reason
        elif intact(part, checksum):
            return ""
        else:
            part.unlink()
            if own:
                return "wrong checksum"


def receive(url: str, part: Path, start: int) -> str:
    """Append to `part`, of `start` bytes, what it lacks of the file at `url`; "" at its end, else why not."""
    request = Request(url, headers={"User-Agent": "distill-lab"} | ({"Range": f"bytes={start}-"} if start else {}))
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            anew = answer.status != 206  # the server knows no Range: all from the beginning
            if anew and start > (answer.length or 0):  # a page of a dead link must not replace a good part
                return f"offers {answer.length or 'unknown'} bytes, but {part} has {start}"
            with part.open("wb" if anew else "ab") as file:
                total = (file.tell() + (answer.length or 0)) >> 20
                bar = Progress(f"fetching {part.stem}, MiB", total, file.tell() >> 20, shown=answer.length is not None)
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.step((file.tell() >> 20) - bar.done)
                bar.close()
            return f"broke off {answer.length} bytes before the end" if answer.length else ""
    except NETWORK as error:
        if start and isinstance(error, HTTPError) and error.code == 416:  # no byte behind the part
            return ""
        return " ".join(str(error).split()) or type(error).__name__


def length(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def intact(path: Path, checksum: str) -> bool:
    """Whether the file's md5 (32 hex digits) or sha256 (64) is that."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, {32: "md5", 64: "sha256"}[len(checksum)]).hexdigest() == checksum


def unpack(archive: Path, folder: Path) -> None:
    """What a tar archive holds below a folder of that name, at `folder`, in one step; for what `fetch` has checked.

    Raises ConfigError where a member leads outside.
    """
    log.info(f"unpacking {archive} to {folder}")
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place, tarfile.open(archive) as file:
        try:
            file.extractall(place, filter="data")
        except tarfile.TarError as error:
            raise ConfigError(f"{archive}: cannot be unpacked ({error}): remove it") from error
        (Path(place) / folder.name).rename(folder)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes `path`, in a folder that is made. Raises ConfigError if that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}): free space or choose another folder"
        ) from error
