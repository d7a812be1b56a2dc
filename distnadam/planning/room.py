"""Whether a host has the memory that a run takes there at least, before it is taken.

`memory` says how much to give a host; here is what surely does not fit. The section Quotas of
deploy/README.md gives the formulas in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distnadam.errors import InsufficientResources
from distnadam.planning.memory import MIB
from distnadam.planning.planned_run import FLOAT32_BYTES, PlannedRun
from distnadam.protocol.messages import ShardSpec
from distnadam.tensors.arrays import dtypes_of
from distnadam.tensors.layout import Layout
from distnadam.transport.shared_memory import arena_bytes

REMEDY = (
    "use more hosts or larger ones, put fewer shards on each, or keep what workers see in "
    "bfloat16 (pull_dtype)"
)


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a host is to give, and for what.

    Args:
        what: as a plural, "the buffers of parameters".
        num_bytes: how many.
    """

    what: str
    num_bytes: int


def buffers(layout: Layout) -> Need:
    """Return what both buffers of the parameters take, which all of a host's shards share."""
    return Need(
        what="two buffers of the parameters",
        num_bytes=arena_bytes(layout.sizes, 2, layout.pull_dtypes),
    )


def state(specs: Sequence[ShardSpec]) -> Need:
    """Return what shards take beside the buffers: moments, an average, float32 masters."""
    listed = ", ".join(str(spec.index) for spec in specs)
    noun = "shard" if len(specs) == 1 else "shards"
    return Need(what=f"the state of {noun} {listed}", num_bytes=sum(map(_state_bytes, specs)))


def standby(spec: ShardSpec) -> Need:
    """Return what a standby takes: all of its shard's arrays."""
    own = sum(
        (end - begin) * dtypes_of(spec.ranges)[space].itemsize
        for space, (begin, end) in spec.ranges.items()
    )
    return Need(
        what=f"the state of a standby of shard {spec.index}",
        num_bytes=own * len(spec.config.state_arrays),
    )


def gradients(sizes: Mapping[str, int]) -> Need:
    """Return what the gradients of one worker take, for so many elements by space."""
    return Need(what="the gradients of a worker", num_bytes=arena_bytes(sizes))


def of_host(run: PlannedRun) -> list[Need]:
    """Return what a host with shards and workers needs at least, by a plan: of shards, standbys,
    workers, and of what a shard and the host's relay keep for others.

    >>> sizes = {"parameters": 2**20, "hosts": 2, "workers_per_host": 2}
    >>> run = PlannedRun(**sizes, replicas=1, sum_group=2)
    >>> [need.num_bytes // 2**20 for need in of_host(run)]
    [8, 4, 6, 8, 2, 2]
    """
    size, held = run.parameters, run.held
    own = 2 * FLOAT32_BYTES + FLOAT32_BYTES * (run.ema + run.half_parameters)
    copied = FLOAT32_BYTES * (3 + run.ema) * run.replicas
    local = 0 if run.shard_hosts else run.workers_per_host
    arriving = run.gradient_bytes * (run.workers - local) // run.sum_group
    sums = FLOAT32_BYTES * run.pushes_of_a_host if run.sum_group > 1 else 0
    gradients = run.workers_per_host * FLOAT32_BYTES * size
    return [
        Need(what="two buffers of the parameters", num_bytes=2 * run.parameter_bytes * size),
        Need(what="the state of its shards", num_bytes=round(own * size * held)),
        Need(what="the state of standbys", num_bytes=round(copied * size * held)),
        Need(what="the gradients of its workers", num_bytes=gradients),
        Need(what="gradients that come from other hosts", num_bytes=round(arriving * size * held)),
        Need(what="its relay's sums", num_bytes=round(sums * size * (1 - held))),
    ]


def beside_shards(specs: Sequence[ShardSpec], *, standbys: bool, workers: bool) -> list[Need]:
    """Return what standbys and workers are to take on the hosts that have shards, in all.

    Args:
        specs: the shards'.
        standbys: whether each shard gets a standby there.
        workers: whether all workers are there.
    """
    needs = []
    if standbys:
        listed = ", ".join(str(spec.index) for spec in specs)
        size = sum(standby(spec).num_bytes for spec in specs)
        needs.append(Need(what=f"the state of a standby of each shard {listed}", num_bytes=size))
    if workers:
        number = specs[0].options.min_workers or specs[0].num_workers
        size = number * gradients(specs[0].layout.sizes).num_bytes
        needs.append(Need(what=f"the gradients of {number} workers", num_bytes=size))
    return needs


def check(where: str, available: int, needs: Sequence[Need]) -> None:
    """Raise InsufficientResources if a host has less memory than what is to begin there needs.

    Args:
        where: the host, the sentence's subject.
        available: bytes that it can still give.
        needs: what is to begin there.

    >>> check("node 10.0.0.2", 2**30, [Need(what="the state of shard 0", num_bytes=2**31)])
    Traceback (most recent call last):
    ...
    distnadam.errors.InsufficientResources: node 10.0.0.2 has 1024 MiB of memory left and needs
    2048 MiB: 2048 MiB for the state of shard 0; use more hosts ...
    """
    least = sum(need.num_bytes for need in needs)
    if least > available:
        listed = ", ".join(f"{_mib(n.num_bytes)} for {n.what}" for n in needs if n.num_bytes)
        raise InsufficientResources(
            f"{where} has {_mib(available)} of memory left and needs {_mib(least)}: {listed}; "
            f"{REMEDY}"
        )


def _state_bytes(spec: ShardSpec) -> int:
    """Return the bytes of a shard's own arrays; of the parameters only a master is its own."""
    arrays = len(spec.config.state_arrays) - 1
    own = dtypes_of(spec.ranges)
    return sum(
        (arrays + (spec.layout.pull_dtypes[space] != own[space]))
        * (end - begin)
        * own[space].itemsize
        for space, (begin, end) in spec.ranges.items()
    )


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // MIB)} MiB"
