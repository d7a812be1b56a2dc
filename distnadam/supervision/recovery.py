"""How each of the policy's decisions is carried out on the fleet. It decides nothing; what it finds on its way is looked at anew."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distnadam import policy
from distnadam.checkpoint.places import Folder
from distnadam.errors import DistNadamError, IllegalMessage, ShardLost, StepTimeout
from distnadam.messages import Description, Hold, Join, Joined, Release
from distnadam.orders import Attach, GiveUp, Reign, Schedule
from distnadam.supervision.crew import Hired
from distnadam.supervision.fleet import Fleet
from distnadam.supervision.source import Source
from distnadam.takeover import adoptions

log = logging.getLogger("distnadam")

_LOAD_S = 3600.0
_HIRE_AGAIN_S = 1.0
_TOKEN = "supervisor"


class Recovery:
    """See the module.

    Args:
        fleet: the processes.
        source: what can be gone back to.
        publish: tells everyone where the shards are now, or why there are none any more.
        hired: told the index and the process of a new standby, None where none could be had, from another thread.
    """

    def __init__(
        self, fleet: Fleet, source: Source, publish: Callable[[str | None], None], hired: Callable[[int, Hired | None], None]
    ) -> None:
        self._fleet, self._source, self._publish, self._hired = fleet, source, publish, hired
        self._hirer = ThreadPoolExecutor(1, "hirer")
        self._filling: set[int] = set()
        self.counts = {"promoted": 0, "rewound": 0, "departed": 0}

    def close(self) -> None:
        """Hire nobody any more."""
        self._hirer.shutdown(cancel_futures=True)

    def carry_out(self, decision: policy.Decision, seen: policy.Seen) -> None:
        """Do what was decided on what was seen."""
        log.info("supervisor: %s", decision)
        if isinstance(decision, policy.Promote):
            self._promote(decision, seen)
        elif isinstance(decision, policy.Rewind):
            self._rewind(decision, seen)
        elif isinstance(decision, policy.Complete):
            self._reign(decision.epoch, next(s.schedule for s in seen.shards if s.epoch == decision.epoch))
        elif isinstance(decision, policy.Depart):
            self._depart(decision, seen)
        elif isinstance(decision, policy.Admit):
            self._admit(decision, seen)
        elif isinstance(decision, policy.GiveUp):
            for rank in decision.ranks:
                self._fleet.ask_all(GiveUp(rank))
        else:
            log.error("supervisor: %s", decision.why)
            self._publish(decision.why)

    # Shards

    def _promote(self, decision: policy.Promote, seen: policy.Seen) -> None:
        fleet, epoch = self._fleet, max(shard.epoch for shard in seen.shards) + 1
        schedule = next((shard.schedule for shard in seen.shards if shard.alive), ())
        for index in decision.shards:
            log.warning("shard %d died; its standby takes over", index)
            fleet.crew.fence(fleet.shards[index])
            standby = fleet.standbys.pop(index)
            reign = Reign(epoch, schedule, dict(fleet.newest))
            try:
                fleet.shards[index] = fleet.crew.promote(standby, reign, near=list(fleet.alive().values()))
            except DistNadamError as error:
                log.warning("the standby of shard %d cannot take over: %s", index, error)
                fleet.crew.fence(standby)
                return
        self.counts["promoted"] += len(decision.shards)
        self._reign(epoch, schedule)

    def _reign(self, epoch: int, schedule: Schedule) -> None:
        self._fleet.ask_all(Reign(epoch, schedule, dict(self._fleet.newest)))
        self._publish(None)

    def _rewind(self, decision: policy.Rewind, seen: policy.Seen) -> None:
        """Make what is gone anew, and have all shards load the newest checkpoint that all of them can read."""
        log.warning("%s: all shards go back to the last checkpoint", decision.why)
        fleet = self._fleet
        for index in fleet.missing():
            fleet.crew.fence(fleet.shards[index])
            fleet.shards[index] = fleet.crew.hire(fleet.spec(index), standby=False, near=list(fleet.alive().values()))
            fleet.crew.watch(fleet.shards[index])
        epoch = max(shard.epoch for shard in seen.shards)
        schedule = next((shard.schedule for shard in seen.shards if shard.alive), ())
        for candidate in self._source.candidates():
            epoch += 1
            loads = self._source.loads(candidate, fleet.specs, epoch, schedule=schedule, newest=dict(fleet.newest))
            answers = fleet.ask(loads, _LOAD_S)
            errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
            if any(isinstance(error, (ShardLost, StepTimeout)) for error in errors):
                return  # another death: look again
            if not errors and len(answers) == len(fleet.shards):
                self._source.changed = None
                self.counts["rewound"] += 1
                self._publish(None)
                return
            for error in errors[:1]:
                log.warning("passing over %s: %s", candidate if isinstance(candidate, Folder) else "the first parameters", error)
        self._publish(f"{decision.why}, and no checkpoint under {self._source.directory} can be loaded")

    # Ranks

    def settle(self, rank: int, incarnation: int) -> bool:
        """Refuse a dead worker from now on; see its last push through where a shard has counted it; return whether that is impossible."""
        joins = self._fleet.ask_all(Join(rank, incarnation + 1, reserve=True))
        joined = {index: answer for index, answer in joins.items() if isinstance(answer, Joined)}
        if len(joined) < len(joins):
            return False  # somebody has taken it over already, who does the same; or a shard died, which comes first
        adopted = self._fleet.ask(adoptions(rank, joined))
        return any(isinstance(answer, IllegalMessage) for answer in adopted.values())

    def _depart(self, decision: policy.Depart, seen: policy.Seen) -> None:
        """Let ranks leave from the first round that no shard can have begun without them."""
        log.warning("ranks %s leave; the others go on", ", ".join(map(str, decision.ranks)))
        first = max(shard.round for shard in seen.shards) + 1
        self._set_members(first, tuple(sorted(seen.members - set(decision.ranks))), seen)
        self.counts["departed"] += len(decision.ranks)

    def _admit(self, decision: policy.Admit, seen: policy.Seen) -> None:
        """Take ranks in between two rounds, the same two on every shard."""
        log.info("ranks %s join", ", ".join(map(str, decision.ranks)))
        held = self._fleet.ask_all(Hold(_TOKEN), self._fleet.options.step_timeout_s)
        try:
            if all(hasattr(answer, "round") for answer in held.values()):
                first = max(answer.round for answer in held.values()) + 1
                self._set_members(first, tuple(sorted(seen.members | set(decision.ranks))), seen)
        finally:
            self._fleet.ask_all(Release(_TOKEN))

    def _set_members(self, first: int, ranks: tuple[int, ...], seen: policy.Seen) -> None:
        newest = max(seen.shards, key=lambda shard: shard.epoch)
        kept = tuple(entry for entry in newest.schedule if entry[0] < first)
        self._reign(newest.epoch + 1, (*kept, (first, ranks)))

    # Standbys

    def fill_standbys(self) -> None:
        """See to it that every shard has a standby that follows it; new processes are made beside the watch."""
        fleet = self._fleet
        for index, answer in fleet.describe().items():
            if not isinstance(answer, Description) or answer.replicated is not None or index in self._filling:
                continue
            standby = fleet.standbys.get(index)
            if standby is None:
                self._filling.add(index)
                self._hirer.submit(self._hire, index, fleet.spec(index), list(fleet.alive().values()))
                continue
            attached = fleet.ask({index: Attach(standby)}, _LOAD_S).get(index)
            if isinstance(attached, Exception):
                log.warning("shard %d: its standby could not be filled: %s", index, str(attached).splitlines()[-1])
                fleet.crew.fence(fleet.standbys.pop(index))

    def take_standby(self, index: int, hired: Hired | None) -> None:
        """Take a new standby that was hired, to be filled."""
        self._filling.discard(index)
        if hired is not None:
            self._fleet.standbys[index] = hired
            self._fleet.crew.watch(hired)

    def _hire(self, index: int, spec: Any, near: list[Hired]) -> None:
        hired = None
        try:
            hired = self._fleet.crew.hire(spec, standby=True, near=near)
        except DistNadamError as error:
            log.warning("no standby for shard %d can be had: %s", index, error)
            time.sleep(_HIRE_AGAIN_S)
        self._hired(index, hired)
