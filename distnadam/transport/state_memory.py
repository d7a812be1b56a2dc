"""A shard's state in memory that its standby of the same machine maps: every array twice, so that
one round's are whole whenever the shard's process dies. The parameters are in the machine's two
parameter buffers; what is beside them lies in an arena of the shard's own.
"""

from distnadam.protocol.messages import ShardSpec
from distnadam.tensors.arrays import Copies, Flat, cut_flat
from distnadam.tensors.layout import sizes_of
from distnadam.transport.shared_memory import Arena


def reserve_state(spec: ShardSpec) -> Arena:
    """Reserve a shard's arrays beside the parameter buffers, twice.

    Raises:
        ArenaError: the machine has not enough memory.
    """
    return Arena.create(sizes_of(spec.ranges), copies=2 * len(_names(spec)))


def copies_in(arena: Arena, spec: ShardSpec) -> Copies:
    """Return both copies of the arrays by name, as `ShardState.keep_twice` takes them."""
    names = _names(spec)
    first, second = arena.flats[: len(names)], arena.flats[len(names) :]
    return dict(zip(names, first, strict=True)), dict(zip(names, second, strict=True))


def map_states(
    spec: ShardSpec, state_fd: int, parameters_fd: int
) -> tuple[dict[str, Flat], dict[str, Flat]]:
    """Return the arrays of a shard's state by name, by the index of the current buffer, in memory
    that another process has made, read-only; takes both descriptors over.

    Raises:
        ArenaError: it is other memory, or cannot be mapped.
    """
    sizes, dtypes = spec.layout.sizes, spec.layout.pull_dtypes
    parameters = Arena.attach(parameters_fd, sizes, copies=2, dtypes=dtypes)
    arena = Arena.attach(state_fd, sizes_of(spec.ranges), copies=2 * len(_names(spec)))
    first, second = (
        _state(spec, buffer, dict(beside))
        for buffer, beside in zip(parameters.flats, copies_in(arena, spec), strict=True)
    )
    return first, second


def _state(spec: ShardSpec, buffer: Flat, beside: dict[str, Flat]) -> dict[str, Flat]:
    masters = beside.pop("masters", {})
    seen = cut_flat(buffer, spec.ranges)
    params = {space: masters[space] if space in _rounded(spec) else seen[space] for space in seen}
    return {"params": params, **beside}


def _rounded(spec: ShardSpec) -> set[str]:
    """Return the spaces that workers see rounded."""
    dtypes = spec.layout.pull_dtypes
    return {space for space in spec.ranges if dtypes[space] != space}


def _names(spec: ShardSpec) -> list[str]:
    names = [name for name in spec.config.state_arrays if name != "params"]
    return [*names, "masters"] if _rounded(spec) else names
