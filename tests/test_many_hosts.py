"""Two hosts under torchrun: network namespaces joined by a cable; where those are refused, two agents on loopback."""

import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import start, wait
from mini_lab import Lab, make_lab

from config import ConfigError
from utils.ddp import own_store, process_group

SECONDS = 20  # that a rank waits for another
LONG = "condense.niter=400"
FAR = 1e-3  # what Adam makes of another order of sums in so many iterations; rows move by more than 1
# How an agent notices that another has gone: torch's own numbers are made for slower jobs.
CONF = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=4"


@dataclass(frozen=True)
class Host:
    """One of the two; `enter` comes before a command that is to run on it."""

    address: str
    interface: str
    enter: tuple[str, ...] = ()

    def run(self, *words: str) -> bool:
        return subprocess.run([*self.enter, *words], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Cluster:
    """Two hosts, the first with the rendezvous, and a small data set that both see."""

    hosts: tuple[Host, Host]
    lab: Lab
    port: int

    def agent(
        self, host: int, nnodes: str, save: str, *more: str, restarts: int = 0, shared: bool = False
    ) -> subprocess.Popen[str]:
        """torchrun with two processes on a host; `shared`: ranks use its store, as by default."""
        h = self.hosts[host]
        return start([
            *h.enter, "env", f"GLOO_SOCKET_IFNAME={h.interface}", f"RANK_TIMEOUT_MINUTES={SECONDS / 60}",
            f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE={1 - shared}", sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={nnodes}", "--nproc_per_node=2",
            f"--max_restarts={restarts}", f"--rdzv_id={save}", "--rdzv_backend=c10d",
            f"--rdzv_endpoint={self.hosts[0].address}:{self.port}", f"--local_addr={h.address}",
            f"--rdzv_conf=is_host={1 - host},{CONF}", *self.lab.words("condense_script_text", save, *more),
        ])  # fmt: skip

    def apart(self, save: str, other: str) -> float:
        """Largest difference between the last rows of two runs."""
        rows = []
        for name in (save, other):
            path = self.lab.run_folder(name) / "distilled_data" / "syn_data_best.pth"
            rows.append(torch.load(path, weights_only=True)["data"])
        return float((rows[0] - rows[1]).abs().max())

    @contextmanager
    def cut_off(self, agent: subprocess.Popen[str]) -> Iterator[None]:
        """The second host cannot be reached; on loopback, all its processes end at once."""
        cable = ("ip", "link", "set", self.hosts[1].interface)
        if not self.hosts[1].enter:
            kill(*children(agent.pid), agent.pid)
            yield
            return
        assert self.hosts[1].run(*cable, "down")
        yield
        assert self.hosts[1].run(*cable, "up")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def wire(first: int, second: int) -> tuple[Host, Host] | None:
    """Join the network namespaces of two processes by a cable; None where the system does not let us."""
    enter = [("nsenter", f"--target={pid}", "--user", "--net", "--preserve-credentials") for pid in (first, second)]
    hosts = (Host("10.83.0.1", "veth0", enter[0]), Host("10.83.0.2", "veth1", enter[1]))
    done = hosts[0].run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1", "netns", str(second))
    for host in hosts:
        done = done and host.run("ip", "addr", "add", f"{host.address}/24", "dev", host.interface)
        done = done and all(host.run("ip", "link", "set", name, "up") for name in ("lo", host.interface))
    return hosts if done else None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """In namespaces of a user's own, which end with the two processes that hold them."""
    held = ["sh", "-c", "echo && exec sleep 3600"]
    command = ["unshare", "--user", "--map-root-user", "--net", *held]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    holders = [subprocess.Popen(command, **pipes)]  # type: ignore[call-overload]
    holders[0].stdout.readline()
    into = ["nsenter", f"--target={holders[0].pid}", "--user", "--preserve-credentials", "unshare", "--net", *held]
    holders.append(subprocess.Popen(into, **pipes))  # type: ignore[call-overload]
    holders[1].stdout.readline()
    try:
        hosts = wire(holders[0].pid, holders[1].pid)
        if hosts is None:
            warnings.warn("no network namespaces here: the two hosts are two agents on loopback", stacklevel=1)
        yield hosts or (Host("127.0.0.1", "lo"), Host("127.0.0.1", "lo"))
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with two_hosts() as hosts:
        yield Cluster(hosts, make_lab(tmp_path_factory.mktemp("hosts")), port)


@pytest.fixture(scope="module")
def long(cluster: Cluster) -> str:
    """A longer run by one process."""
    wait(cluster.lab.condense("long", LONG))
    return "long"


def saved(cluster: Cluster, save: str) -> int:
    return int(torch.load(cluster.lab.run_folder(save) / "state.pth", weights_only=True)["iteration"])


def resumed(err: str) -> list[int]:
    return [int(line.split()[3]) for line in err.splitlines() if line.startswith("resumed at iteration")]


def test_two_hosts_of_two_processes_learn_what_one_process_learns(cluster: Cluster) -> None:
    alone = cluster.lab.condense("alone")
    for agent in [cluster.agent(host, "2", "together") for host in (0, 1)]:
        wait(agent)
    wait(alone)
    assert cluster.apart("together", "alone") <= 1e-5


def test_ranks_of_a_restart_do_not_meet_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # as the launcher's, it outlives every start
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))
    for size in (3, 3, 2, 4):
        found: list[dist.Store] = []

        def join(rank: int, size: int = size, found: list[dist.Store] = found) -> None:
            found.append(own_store(rank, size, timedelta(seconds=20)))

        ranks = [threading.Thread(target=join, args=[rank]) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        found[0].set("address", str(size))
        assert [other.get("address") for other in found] == [str(size).encode()] * size
        assert all(not other.check(["address of the last start"]) for other in found)
        found[0].set("address of the last start", "")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e9", ""])
def test_a_timeout_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_TIMEOUT_MINUTES", text)
    with pytest.raises(ConfigError, match="RANK_TIMEOUT_MINUTES"), process_group(torch.device("cpu")):
        pass


@pytest.mark.slow  # pytest -m slow tests/test_many_hosts.py: 5 minutes
def test_a_host_that_is_cut_off_is_noticed_and_the_other_goes_on_alone(cluster: Cluster, long: str) -> None:
    agents = [cluster.agent(host, "1:2", "cut", LONG, restarts=2) for host in (0, 1)]
    cluster.lab.wait_for_state("cut", agents[0])
    with cluster.cut_off(agents[1]):
        before = saved(cluster, "cut")
        here = wait(agents[0])
    agents[1].kill()  # it waits for the rendezvous, as long as TCP does
    there = wait(agents[1], -signal.SIGKILL)
    assert "another rank is lost" in here.err and "RANK_TIMEOUT_MINUTES is 0.333" in here.err
    assert "Traceback" not in here.err
    assert before < 400 and [at for at in resumed(here.err) if at >= before]
    assert cluster.apart("cut", long) <= FAR
    if cluster.hosts[1].enter:
        assert f"rank 2 of 4: another rank is lost (Timed out waiting {SECONDS}000ms" in there.err
        assert "Traceback" not in there.err


@pytest.mark.slow
def test_a_killed_rank_brings_all_hosts_back_from_the_last_state(cluster: Cluster, long: str) -> None:
    agents = [cluster.agent(host, "2", "killed", LONG, restarts=2, shared=True) for host in (0, 1)]
    cluster.lab.wait_for_state("killed", agents[0])
    before = saved(cluster, "killed")
    kill(children(agents[1].pid)[0])
    here, _ = [wait(agent) for agent in agents]
    assert [at for at in resumed(here.err) if at >= before]
    assert cluster.apart("killed", long) <= FAR


@pytest.mark.slow
def test_a_host_may_join_a_job_that_is_under_way(cluster: Cluster, long: str) -> None:
    first = cluster.agent(0, "1:2", "grown", LONG)
    cluster.lab.wait_for_state("grown", first)
    second = cluster.agent(1, "1:2", "grown", LONG)
    here, _ = wait(first), wait(second)
    assert "stopped by SIGTERM" in here.err and resumed(here.err)
    assert cluster.apart("grown", long) <= FAR
