"""The relays of an optimizer, as its supervisor makes, watches and ends them: one per node whose
workers have shards on other nodes.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distnadam.backends.ray import registry
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.processes import kill_actor
from distnadam.errors import LaneError

log = logging.getLogger("distnadam")

_START_S = 60.0
_BEAT_S = 1.0
_SILENT_S = 10.0
"""Seconds after which one that does not answer is ended, if shards have no less: nothing is lost
with it.
"""
_IDLE_S = 10.0
"""Seconds after which a relay that no worker uses is ended."""


@dataclass(frozen=True, kw_only=True)
class RelayProcess:
    """A relay's actor and process."""

    handle: Any
    address: ProcessAddress


class Relays:
    """The relays by node; used in the loop of the supervisor's actor.

    Args:
        make: returns a new actor on a node.
        run: begins the names of the optimizer's processes.
        kill_on: kills processes of another node.
        patience_s: seconds after which a shard that does not answer counts as dead.
    """

    def __init__(
        self,
        make: Callable[[str], Any],
        run: str,
        kill_on: registry.KillOn,
        patience_s: float,
    ) -> None:
        self._make = make
        self._run = run
        self._kill_on = kill_on
        self._patience_s = min(patience_s, _SILENT_S)
        self._relays: dict[str, RelayProcess] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        # of each node: a start that takes long holds up no other
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._is_closed = False

    async def on(self, node: str, gone: ProcessAddress | None) -> RelayProcess:
        """Return the relay of a node; a new one if there is none.

        Args:
            node: the Ray node.
            gone: the caller knows that this process has ended.

        Raises:
            LaneError: none can be started there.
        """
        async with self._starting[node]:
            if (relay := self._relays.get(node)) is not None and relay.address == gone:
                await self._end(node)
            if node not in self._relays:
                await self._start(node)
            return self._relays[node]

    async def _start(self, node: str) -> None:
        if self._is_closed:
            raise LaneError("the optimizer was closed")
        handle = self._make(node)
        try:
            address = await asyncio.wait_for(handle.address.remote(), _START_S)
        except Exception as error:
            kill_actor(handle)
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise LaneError(f"no relay could be started on node {node[:12]}: {why[0]}") from error
        self._relays[node] = RelayProcess(handle=handle, address=address)
        self._watches[node] = asyncio.create_task(self._watch(node, self._relays[node]))

    async def _watch(self, node: str, relay: RelayProcess) -> None:
        """End a relay once it does not answer, or has no worker any more."""
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                idle_s = await asyncio.wait_for(relay.handle.beat.remote(), self._patience_s)
            except Exception as error:  # it, its node or Ray is gone, or it stands still
                idle_s = _IDLE_S
                log.warning("the relay of node %s: %s", node[:12], str(error) or "is silent")
            if idle_s < _IDLE_S:
                continue
            async with self._starting[node]:
                if self._relays.get(node) is relay:
                    del self._watches[node]  # this task, which ends by itself
                    await self._end(node)
            return

    async def _end(self, node: str) -> None:
        relay = self._relays.pop(node)
        if (watch := self._watches.pop(node, None)) is not None:
            watch.cancel()
        kill_actor(relay.handle)
        with contextlib.suppress(Exception):  # Ray is gone, and the process with it
            await asyncio.to_thread(
                registry.end,
                self._run,
                [relay.address],
                self._kill_on,
                grace_s=registry.GRACE_S,  # Ray reports a kill by signal to the user
            )

    async def close(self) -> None:
        """End all relays; start none any more."""
        self._is_closed = True
        for node, starting in list(self._starting.items()):
            async with starting:
                if node in self._relays:
                    await self._end(node)
