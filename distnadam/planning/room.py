"""Whether a host has the memory that a run takes there at least, before it is taken.

`memory` says how much to give a host; here is what surely does not fit. The section Quotas of
deploy/README.md gives the formulas in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distnadam.errors import InsufficientResources
from distnadam.planning.memory import MIB
from distnadam.planning.topology import FLOAT32_BYTES, Topology
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


def of_host(run: Topology) -> list[Need]:
    """Return what a host with shards and workers needs at least, by a plan."""
    size = run.parameters
    own = 2 * FLOAT32_BYTES + FLOAT32_BYTES * (run.ema + run.half_parameters)
    return [
        Need(what="two buffers of the parameters", num_bytes=2 * run.parameter_bytes * size),
        Need(what="the state of its shards", num_bytes=round(own * size * run.held)),
        Need(
            what="the gradients of its workers",
            num_bytes=run.workers_per_host * FLOAT32_BYTES * size,
        ),
    ]


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
