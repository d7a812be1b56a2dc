"""A replication stream between two objects of one process, records as the bytes that a socket
carries.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.errors import ShardLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.codec import pack_record, unpack_record
from distnadam.protocol.supervisor_messages import DetachStandby, Record, ReplicatedRound
from distnadam.runtime.standby import Standby
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Flat
from distnadam.transport.replication import ReplicationStream


def kept_twice(state: ShardState) -> tuple[dict[str, Flat], dict[str, Flat]]:
    """Have a state kept twice, and return its arrays by name, by the index of the buffer."""
    if state.copies is None:
        beside = state.arrays() | ({"masters": state.masters} if state.masters else {})
        del beside["params"]
        state.keep_twice((_copies(beside), _copies(beside)))
    assert state.copies is not None
    first, second = (
        {"params": seen | beside.pop("masters", {}), **beside}
        for seen, beside in zip(state.buffers, map(dict, state.copies), strict=True)
    )
    return first, second


def _copies(arrays: dict[str, Flat]) -> dict[str, Flat]:
    return {
        name: {space: values.copy() for space, values in flat.items()}
        for name, flat in arrays.items()
    }


class InProcessStream(ReplicationStream):
    """A primary's stream to a standby of its process; `sent` are the records that arrived.

    `failure` is what the standby raised when it could not follow.

    Args:
        standby: follows.
        control_state: the primary's.
        config: the primary's.
        state: the primary's arrays, which are copied, or its state, whose memory is mapped.
        alive: whether the standby lives.
    """

    def __init__(
        self,
        standby: Standby,
        control_state: Any,
        config: NadamConfig,
        state: dict[str, Flat] | ShardState,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        if not alive():
            raise ShardLost("the standby is dead")
        self._standby = standby
        self._alive = alive
        self.failure: Exception | None = None
        self.sent: list[Record] = []
        if isinstance(state, ShardState):
            standby.map_states(kept_twice(state))
        else:
            self.mean = {space: np.empty_like(values) for space, values in state["params"].items()}
            standby.take_arrays(_copies(state))
        standby.begin(control_state, config)
        self.reached = control_state.round

    @override
    def ready(self) -> bool:
        return self._alive() and self.failure is None

    @override
    def send(self, record: Record) -> bool:
        if not self.ready():
            return False
        self.sent.append(record)
        try:
            self._standby.apply(unpack_record(pack_record(record)[4:]), self.mean)
        except Exception as error:  # a standby that cannot follow ends its stream
            self.failure = error
            return False
        if isinstance(record, ReplicatedRound):
            self.reached = record.round
        return True

    @override
    def close(self) -> None:
        if self._alive():
            self._standby.apply(DetachStandby(), self.mean)
            self.sent.append(DetachStandby())
