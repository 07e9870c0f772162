"""Downloads against a server that breaks off, knows no Range, or has another file; archives that lead outside."""

import hashlib
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from config import ConfigError
from utils.downloads import ARCHIVES, Archive, fetch, fetch_dataset, unpack
from utils.image_readers import read_images

DATA = np.random.default_rng(0).bytes(300_000)
MD5, SHA256 = hashlib.md5(DATA).hexdigest(), hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; sends at most `budget` bytes an answer; with `ranges` it can go on from the middle."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.budget, self.ranges = files, 1 << 40, True
        self.asked: list[tuple[str, str]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path[1:], self.headers.get("Range", "")
        self.server.asked.append((name, wanted))
        data, start = self.server.files.get(name), 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if data is None:
            return self.send_error(404)
        if start and start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + self.server.budget])
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server({"file.bin": DATA}) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.mark.parametrize("checksum", [MD5, SHA256])
def test_a_file_is_fetched_once(server: Server, tmp_path: Path, checksum: str) -> None:
    target = tmp_path / "new" / "file.bin"
    for _ in range(2):
        assert fetch([server.url("file.bin")], target, checksum) == target
        assert target.read_bytes() == DATA
    assert server.asked == [("file.bin", "")]
    assert [p.name for p in target.parent.glob("[!.]*")] == ["file.bin"]


def test_a_server_that_breaks_off_is_asked_for_the_rest(server: Server, tmp_path: Path) -> None:
    server.budget = 110_000
    assert fetch([server.url("file.bin")], tmp_path / "a", MD5).read_bytes() == DATA
    assert [r for _, r in server.asked] == ["", "bytes=110000-", "bytes=220000-"]


def test_a_part_of_an_earlier_run_is_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(DATA[:123_456])
    assert fetch([server.url("file.bin")], tmp_path / "a", MD5).read_bytes() == DATA
    assert server.asked == [("file.bin", "bytes=123456-")]


def test_a_whole_part_of_a_killed_run_is_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(DATA)
    assert fetch([server.url("file.bin")], tmp_path / "a", MD5).read_bytes() == DATA
    assert server.asked == [("file.bin", "bytes=300000-")]


def test_without_range_it_starts_again_and_gives_up_once_nothing_is_gained(server: Server, tmp_path: Path) -> None:
    server.ranges, server.budget = False, 110_000
    with pytest.raises(ConfigError, match="broke off 190000 bytes before the end"):
        fetch([server.url("file.bin")], tmp_path / "a", MD5)
    assert len(server.asked) == 2 and not (tmp_path / "a").exists()
    server.budget = 1 << 40
    assert fetch([server.url("file.bin")], tmp_path / "a", MD5).read_bytes() == DATA


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * 400_000])
def test_a_part_of_another_file_is_dropped(server: Server, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "a.part").write_bytes(stale)
    assert fetch([server.url("file.bin")], tmp_path / "a", MD5).read_bytes() == DATA
    assert [r for _, r in server.asked] == [f"bytes={len(stale)}-", ""]


def test_links_are_tried_in_order(server: Server, tmp_path: Path) -> None:
    server.files["other.bin"] = DATA[::-1]
    links = ["http://127.0.0.1:1/x", server.url("gone"), server.url("other.bin"), server.url("file.bin")]
    assert fetch(links, tmp_path / "a", MD5).read_bytes() == DATA
    assert [name for name, _ in server.asked] == ["gone", "other.bin", "file.bin"]


def test_the_page_of_a_dead_link_does_not_replace_a_good_part(server: Server, tmp_path: Path) -> None:
    server.ranges, server.files["moved"] = False, b"<html>moved</html>"
    (tmp_path / "a.part").write_bytes(DATA[:200_000])
    with pytest.raises(ConfigError, match="offers 18 bytes, but .*a.part has 200000"):
        fetch([server.url("moved")], tmp_path / "a", MD5)
    server.ranges = True
    assert fetch([server.url("file.bin")], tmp_path / "a", MD5).read_bytes() == DATA
    assert server.asked[-1] == ("file.bin", "bytes=200000-")


def test_a_wrong_checksum_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wrong checksum"):
        fetch([server.url("file.bin")], tmp_path / "a", "0" * 32)
    assert len(server.asked) == 1 and not list(tmp_path.glob("[!.]*"))


def test_a_changed_target_is_not_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="a: its checksum is not"):
        fetch([server.url("file.bin")], tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == b"mine" and not server.asked


def test_without_a_network_one_line_gives_file_links_and_target(tmp_path: Path) -> None:
    links, target = ["http://127.0.0.1:1/x", "http://127.0.0.1:1/y"], tmp_path / "file.tgz"
    with pytest.raises(ConfigError, match="^file.tgz: cannot be fetched") as caught:
        fetch(links, target, MD5)
    line = str(caught.value)
    assert "\n" not in line and all(text in line for text in (*links, str(target), "Connection refused"))


def test_a_folder_that_cannot_be_made_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(ConfigError, match="data/a: cannot be written"):
        fetch([server.url("file.bin")], tmp_path / "data" / "a", MD5)


def packed(members: dict[str, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("files/link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            file.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def archive(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    server.files["a.tar.gz"] = packed({"cifar-100-python/train": b"1", "attributes.txt": b"2"})
    md5 = hashlib.md5(server.files["a.tar.gz"]).hexdigest()
    monkeypatch.setitem(ARCHIVES, "cifar100", Archive((server.url("a.tar.gz"),), md5, "cifar-100-python"))
    return server


def test_a_data_set_is_fetched_on_first_use(archive: Server, tmp_path: Path) -> None:
    for _ in range(2):
        assert fetch_dataset("cifar100", tmp_path) == tmp_path / "cifar-100-python"
    assert (tmp_path / "cifar-100-python" / "train").read_bytes() == b"1"
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["a.tar.gz", "cifar-100-python"]
    assert len(archive.asked) == 1


def test_nothing_is_fetched_for_a_folder_that_is_there(archive: Server, tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    assert fetch_dataset("cifar100", tmp_path) == tmp_path / "cifar-100-python"
    assert fetch_dataset("cifar100", shared_data) == shared_data / "cifar100" / "cifar-100-python"
    assert fetch_dataset("imagenet", tmp_path) == tmp_path / "imagenet"
    assert not archive.asked and not list(tmp_path.glob(".*"))


def test_an_archive_put_there_by_hand_needs_no_network(archive: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(archive.files["a.tar.gz"])
    assert fetch_dataset("cifar100", tmp_path).is_dir() and not archive.asked


def test_two_at_once_fetch_one_copy(archive: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: fetch_dataset("cifar100", tmp_path), range(4)))
    assert found == {tmp_path / "cifar-100-python"} and len(archive.asked) == 1


@pytest.mark.parametrize("name, link", [("../evil", ""), ("files/a", "../../outside"), ("files/a", "/etc/passwd")])
def test_an_archive_that_leads_outside_is_refused(tmp_path: Path, name: str, link: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(packed({name: b""}, link))
    with pytest.raises(ConfigError, match="a.tar: cannot be unpacked"):
        unpack(tmp_path / "in" / "a.tar", tmp_path / "in" / "files")
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_links_and_checksums_of_cifar_are_torchvision_s() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for name, official in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        known = ARCHIVES[name]
        assert (known.urls[0], known.md5, known.folder) == (official.url, official.tgz_md5, official.base_folder)
    assert all(re.fullmatch("[0-9a-f]{32}", known.md5) for known in ARCHIVES.values())


def test_what_is_fetched_is_what_is_read(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         shared_data: Path) -> None:  # fmt: skip
    source = shared_data / "cub200" / "CUB_200_2011"
    members = {f"CUB_200_2011/{p.name}": p.read_bytes() for p in source.glob("*.txt")}
    listed = [line.split()[1] for line in (source / "images.txt").read_text().splitlines()]
    members |= {f"CUB_200_2011/images/{name}": b"" for name in listed}
    server.files["CUB.tgz"] = packed(members)
    md5 = hashlib.md5(server.files["CUB.tgz"]).hexdigest()
    monkeypatch.setitem(ARCHIVES, "cub200", Archive((server.url("CUB.tgz"),), md5, "CUB_200_2011"))
    assert len(read_images("cub200", fetch_dataset("cub200", tmp_path)).train.labels) == 750
