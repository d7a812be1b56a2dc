"""A run over hosts of which one has half of the CPU time that its shard needs; prints "done".

python -m tests.backends.ray.half_a_cpu, where control groups of version 1 can be made. The hosts
are nodes of one Ray on this machine, each with an address of its own. The quota is on the shard's
process, in the usual periods of 100 ms: half of what it uses beside the others, whatever else
the machine does, and half of that again until the host is named.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from distnadam import DistNadam, Options
from distnadam.client.status import RunningOptimizer, Status
from tests.eventually import eventually

CGROUPS = Path("/sys/fs/cgroup/cpu")
_PERIOD_US, _LEAST_US = 100_000, 1000
HOSTS = 3
SLOW = f"127.0.0.{HOSTS + 1}"
SIZE = 3_000_000
PARAMS = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}
GRADIENT = {"w": np.sin(np.arange(SIZE)).astype(np.float32)}
_LOOKS, _LOOK_S = 8, 3.0


class Trainer:
    """Steps in a thread until it is told to stop."""

    def __init__(self, optimizer: DistNadam) -> None:
        self._worker = optimizer.worker(0)
        self._stop = threading.Event()
        self.steps = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._worker.step(GRADIENT)
            self.steps += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def quota_of(pid: int) -> Iterator[Path]:
    """Put a process into a control group of its own, which has all CPU time at first."""
    group = CGROUPS / f"distnadam-test-{pid}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cgroup.procs").write_text(str(pid))
        yield group
    finally:
        for inside in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CGROUPS / "cgroup.procs").write_text(inside)
        eventually(lambda: _is_removed(group))


def _is_removed(group: Path) -> bool:
    with contextlib.suppress(OSError):  # what was in it has not ended yet
        group.rmdir()
    return not group.exists()


def used_s(pid: int) -> float:
    """The seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def named(running: RunningOptimizer, pid: int, group: Path) -> Status:
    """Give the process half of the CPU time that it uses until a status names its host."""
    said = []
    for look in range(_LOOKS):
        before, used, since = running.status(), used_s(pid), time.monotonic()
        time.sleep(_LOOK_S)
        share = (used_s(pid) - used) / (time.monotonic() - since)
        status = running.status(before)
        if look and any(each.host == SLOW and each.what == "CPU" for each in status.slow):
            return status
        said.append(f"{share:.3f} CPUs: {status.paces}, {status.slow}")
        quota = max(_LEAST_US, int(share * _PERIOD_US / 2))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    raise AssertionError(said)


def held(status: Status) -> dict[str, int]:
    """The elements that each host holds."""
    return {pace.host: pace.elements for pace in status.paces}


def play(address: str) -> None:
    """Train, slow a host down, balance, and compare the bits."""
    options = Options(shard_resources={"shard": 1}, kernel="numpy")
    optimizer = DistNadam(num_shards=HOSTS, backend="ray", name="half", options=options)
    optimizer.build(PARAMS)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    backend = optimizer.shards.backend
    (pid,) = (each.pid for each in backend.addresses if nodes[each.node] == SLOW)
    running = RunningOptimizer(backend, backend.supervisor.specs()[0])
    trainer = Trainer(optimizer)
    try:
        with quota_of(pid) as group:
            before = held(named(running, pid, group))
            command = ["reshard", "half", "--balance", "--over", "4", "--address", address]
            done = subprocess.run(
                [sys.executable, "-m", "distnadam", *command], capture_output=True, text=True
            )
            assert f"{SLOW} is slow: its CPU steps" in done.stdout, done
            assert f"{HOSTS} shard(s) by what their hosts can do" in done.stdout, done
        earlier, steps = running.status(), trainer.steps
        while trainer.steps < steps + 3:
            time.sleep(0.1)
        after = held(running.status(earlier))
        assert after[SLOW] < 0.8 * before[SLOW], (before, after)
        assert sum(after.values()) == SIZE
    finally:
        trainer.stop()
    stepped = optimizer.get_params()["w"]
    optimizer.close()
    with DistNadam(backend="local").build(PARAMS) as alone:
        for _ in range(trainer.steps):
            alone.apply_gradients(GRADIENT)
        assert alone.get_params()["w"].tobytes() == stepped.tobytes()


def main() -> None:
    how = {"object_store_memory": 80 * 2**20}
    head = {"num_cpus": 1, "include_dashboard": False} | how
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for host in range(HOSTS):
        address = f"127.0.0.{host + 2}"
        cluster.add_node(num_cpus=1, resources={"shard": 2}, node_ip_address=address, **how)
    ray.init(address=cluster.address, log_to_driver=False)
    play(cluster.address)
    ray.shutdown()
    cluster.shutdown()
    print("done")


if __name__ == "__main__":
    main()
