"""Measures what this host can do, for a plan; on all hosts at once, they share what they share."""

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import in_order
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.nadam.stepper import Part, RangeStep, Slots

_ELEMENTS = 1 << 23
"""32 MiB an array, more than caches hold."""
_TIMES = 5
_CHUNK = 1 << 20
_SENT_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class HostSpeed:
    """What one host can do; see `Constants`.

    Attributes:
        cores: that this process may use.
        copy_bytes_per_s: of memory read and written, one core.
        step_bytes_per_s: of memory that a Nadam step of one core reads and writes.
        socket_bytes_per_s: that one core sends, or receives, by TCP.
    """

    cores: float
    copy_bytes_per_s: float
    step_bytes_per_s: float
    socket_bytes_per_s: float


def measure_host() -> HostSpeed:
    """Measure this host for about two seconds."""
    arrays = [np.ones(_ELEMENTS, np.float32) for _ in range(5)]
    return HostSpeed(
        cores=float(len(os.sched_getaffinity(0))),
        copy_bytes_per_s=2 * arrays[0].nbytes / _median_s(lambda: np.copyto(arrays[0], arrays[1])),
        step_bytes_per_s=7 * arrays[0].nbytes / _median_s(_step_of(arrays)),
        socket_bytes_per_s=_socket_speed(),
    )


def _step_of(arrays: list[np.ndarray]) -> Callable[[], object]:
    """Return a step of one thread from one buffer of parameters into another."""
    p, m, v, written, gradient = arrays
    stepper = make_stepper("auto", np.float32, 1)
    step = RangeStep(
        slots=Slots(p, m, v, written),
        gradients=[gradient],
        grouping=in_order(1),
        scalars=step_scalars(Clock(1, 1.0), NadamConfig()),
    )
    shares = stepper.share([Part(0, p.size)])
    return lambda: stepper.step(step, shares)


def _median_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_TIMES + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _socket_speed() -> float:
    """Return the bytes that one core sends or receives in a second, over the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sending = socket.create_connection(server.getsockname())
        receiving, _ = server.accept()
    with sending, receiving:
        room, chunk = bytearray(_CHUNK), bytes(_CHUNK)
        before = time.process_time()
        thread = threading.Thread(target=_send, args=(sending, chunk))
        thread.start()
        left = _SENT_BYTES
        while left > 0:
            left -= receiving.recv_into(room)
        thread.join()
        computed_s = time.process_time() - before
    return 2 * _SENT_BYTES / max(computed_s, 1e-9)


def _send(sending: socket.socket, chunk: bytes) -> None:
    for _ in range(_SENT_BYTES // _CHUNK):
        sending.sendall(chunk)
