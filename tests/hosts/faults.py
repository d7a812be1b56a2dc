"""The kinds of fault between hosts, as a table. Each is struck while `fit` trains, is over when the
strike returns, and waits until the others have gone on.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from distnadam.backends.ray.output import PREFIX, RELAY, SHARD, WORKER
from tests.hosts.cluster import Cluster
from tests.hosts.network import Host

Rng = np.random.Generator
PORTS = (21000, 21099)
"""Where the shards of these runs listen for other hosts."""
SHARD_TIMEOUT_S = 8.0
_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a fault is struck.

    `go_on` waits for the next step that began after the strike, and returns the seconds until it;
    `model_bytes` are those of the parameters.
    """

    cluster: Cluster
    host: Host
    go_on: Callable[[], float]
    rng: Rng
    model_bytes: int

    def process(self, title: str) -> int:
        """Return one of our processes of that kind, on any host."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            found = sorted(
                pid
                for host in self.cluster.hosts
                for pid in host.processes()
                if _title(pid).startswith(f"ray::{PREFIX}") and f" {title}" in _title(pid)
            )
            if found:
                return int(self.rng.choice(found))
            assert time.monotonic() < deadline, f"no process is a {title}"
            time.sleep(0.05)


def _title(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/cmdline", encoding="utf-8") as title:
        return title.read().replace("\0", " ")
    return ""


@dataclass(frozen=True)
class Fault:
    """A kind: its name, the strike, whether the head's host may get it, and whether every process
    lives on.
    """

    name: str
    strike: Callable[[Scene], float]
    head_too: bool = False
    spares: bool = False


# Hosts and their links


def _for_good(scene: Scene, how: str) -> float:
    """Strike a host, and bring it back after the others have gone on: its link, then its node."""
    scene.cluster.kill(scene.host, how)
    seconds = scene.go_on()
    if how != "kill" and scene.rng.random() < 0.5:
        scene.host.unshape()
        scene.host.mend()
        time.sleep(scene.rng.uniform(0, 3.0))
    scene.cluster.restart(scene.host)
    return seconds


def _for_a_moment(scene: Scene, how: str) -> float:
    scene.cluster.kill(scene.host, how)
    time.sleep(scene.rng.choice([0.05, 0.5, 2.0]) * scene.rng.random())
    _whole_again(scene)
    return scene.go_on()


def _again_and_again(scene: Scene) -> float:
    for _ in range(scene.rng.integers(3, 7)):
        scene.host.cut()
        time.sleep(scene.rng.uniform(0.02, 0.4))
        scene.host.mend()
        time.sleep(scene.rng.uniform(0.02, 0.4))
    return scene.go_on()


def _slow(scene: Scene) -> float:
    scene.host.shape(1e6, burst_bytes=16_000)
    time.sleep(scene.rng.uniform(1.0, 4.0))
    _whole_again(scene)
    return scene.go_on()


def _lossy(scene: Scene) -> float:
    scene.host.lose_and_reorder(lost=scene.rng.uniform(0.01, 0.1), late=0.1)
    time.sleep(scene.rng.uniform(1.0, 4.0))
    _whole_again(scene)
    return scene.go_on()


def _whole_again(scene: Scene) -> None:
    scene.host.unshape()
    scene.host.mend()
    scene.cluster.struck.discard(scene.host)


# Connections


def _reset(scene: Scene) -> float:
    for _ in range(scene.rng.integers(1, 6)):
        scene.host.reset(*PORTS)
        time.sleep(scene.rng.uniform(0, 0.2))
    return scene.go_on()


def _half_sent(scene: Scene, then: Callable[[Scene], None]) -> float:
    """Slow a link down until a model takes seconds, and strike while its bytes are under way."""
    scene = replace(scene, host=_busy_host(scene))
    scene.host.shape(8 * scene.model_bytes / 2.0, burst_bytes=16_000)
    time.sleep(scene.rng.uniform(0.2, 1.5))
    then(scene)
    _whole_again(scene)
    return scene.go_on()


def _busy_host(scene: Scene) -> Host:
    """Wait until a host's link carries a model's bytes: one that joined again may have no work."""
    deadline = time.monotonic() + _PATIENCE_S
    hosts = scene.cluster.hosts[1:]
    before = [sum(host.traffic()) for host in hosts]
    while True:
        for host, already in zip(hosts, before, strict=True):
            if sum(host.traffic()) > already + scene.model_bytes:
                return host
        assert time.monotonic() < deadline, "no model's bytes are under way"
        time.sleep(0.01)


def _reset_now(scene: Scene) -> None:
    scene.host.reset(*PORTS)


def _cut_now(scene: Scene) -> None:
    scene.host.cut()
    time.sleep(scene.rng.uniform(0.1, 1.5))


# Processes


def _kill(scene: Scene, title: str) -> None:
    with suppress(ProcessLookupError):
        os.kill(scene.process(title), signal.SIGKILL)


def _killed(scene: Scene, title: str) -> float:
    _kill(scene, title)
    return scene.go_on()


def _halted(scene: Scene, title: str, seconds: tuple[float, float]) -> float:
    victim = scene.process(title)
    with suppress(ProcessLookupError):  # it is killed, once its time is over
        os.kill(victim, signal.SIGSTOP)
        time.sleep(scene.rng.uniform(*seconds))
        os.kill(victim, signal.SIGCONT)
    return scene.go_on()


# Strangers


def _strangers(scene: Scene, how: str) -> float:
    def listening() -> list[tuple[str, int]]:
        return [(h.address, port) for h in scene.cluster.hosts for port in h.listening(*PORTS)]

    targets, deadline = listening(), time.monotonic() + 30.0
    while not targets:  # a shard that has replaced another listens once a relay asks for it
        assert time.monotonic() < deadline, "no shard listens for other hosts"
        time.sleep(0.05)
        targets = listening()
    most = len(targets) * (0 if how == "garbage" else 64)
    about = {"targets": targets, "how": how, "each": 100, "most": most}
    program = scene.cluster.python(scene.host, "-m", "tests.hosts.strangers", json.dumps(about))
    left = program.first("left")["left"]
    assert left <= most, f"{left} strangers are heard, of {most} at most"
    seconds = scene.go_on()
    program.finish()
    return seconds


_LITTLE, _MUCH = (0.1, 3.0), (SHARD_TIMEOUT_S + 2, SHARD_TIMEOUT_S + 5)

HOSTS = (
    Fault("host cut off", partial(_for_good, how="cut")),
    Fault("host killed", partial(_for_good, how="kill")),
    Fault("host not heard", partial(_for_good, how="silence")),
    Fault("host not hearing", partial(_for_good, how="deafen")),
    Fault(
        "host cut off for a moment", partial(_for_a_moment, how="cut"), head_too=True, spares=True
    ),
    Fault(
        "host not heard for a moment",
        partial(_for_a_moment, how="silence"),
        head_too=True,
        spares=True,
    ),
    Fault(
        "host not hearing for a moment",
        partial(_for_a_moment, how="deafen"),
        head_too=True,
        spares=True,
    ),
    Fault("link up and down", _again_and_again, head_too=True, spares=True),
)
"""Those of a host or its link as a whole."""

FAULTS = (
    *HOSTS,
    Fault("link slow", _slow, head_too=True, spares=True),
    Fault("packets lost and late", _lossy, head_too=True, spares=True),
    Fault("connections reset", _reset, head_too=True, spares=True),
    Fault("push half sent, connection reset", partial(_half_sent, then=_reset_now), spares=True),
    Fault("push half sent, host cut off", partial(_half_sent, then=_cut_now)),
    Fault("push half sent, worker killed", partial(_half_sent, then=partial(_kill, title=WORKER))),
    Fault("push half sent, shard killed", partial(_half_sent, then=partial(_kill, title=SHARD))),
    Fault("push half sent, relay killed", partial(_half_sent, then=partial(_kill, title=RELAY))),
    Fault("worker killed", partial(_killed, title=WORKER), head_too=True),
    Fault("shard killed", partial(_killed, title=SHARD), head_too=True),
    Fault(
        "worker halted", partial(_halted, title=WORKER, seconds=_LITTLE), head_too=True, spares=True
    ),
    Fault(
        "shard halted", partial(_halted, title=SHARD, seconds=_LITTLE), head_too=True, spares=True
    ),
    Fault("shard halted too long", partial(_halted, title=SHARD, seconds=_MUCH), head_too=True),
    Fault("relay killed", partial(_killed, title=RELAY), head_too=True),
    Fault(
        "relay halted", partial(_halted, title=RELAY, seconds=_LITTLE), head_too=True, spares=True
    ),
    Fault("relay halted too long", partial(_halted, title=RELAY, seconds=_MUCH), head_too=True),
    Fault("strangers flood the ports", partial(_strangers, how="silence"), spares=True),
    Fault("strangers hold half a frame", partial(_strangers, how="half"), spares=True),
    Fault("strangers send garbage", partial(_strangers, how="garbage"), spares=True),
)
