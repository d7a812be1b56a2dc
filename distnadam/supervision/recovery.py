"""How each of the policy's decisions is carried out on the fleet. It decides nothing; what it finds on its way is looked at anew."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distnadam import policy
from distnadam.errors import DistNadamError, IllegalMessage, ShardLost, StepTimeout
from distnadam.layout import Ranges
from distnadam.messages import Advance, Description, Held, Hold, Join, Joined, Release
from distnadam.orders import Attach, GiveUp, Load, Reign, Retire, Schedule
from distnadam.supervision.crew import Hired
from distnadam.supervision.fleet import ASK_S, Fleet
from distnadam.supervision.source import Source
from distnadam.takeover import adoptions

log = logging.getLogger("distnadam")

_LOAD_S = 3600.0
_HOLD_S = 10.0
_HIRE_AGAIN_S = 1.0
_TOKEN = "supervisor"


class Recovery:
    """See the module.

    Args:
        fleet: the processes.
        source: what can be gone back to.
        publish: tells everyone where the shards are now, or why there are none any more.
        hired: told from another thread of which reshard, for which shard, and the process of a new standby; None where none could be had.
    """

    def __init__(
        self, fleet: Fleet, source: Source, publish: Callable[[str | None], None], hired: Callable[[int, int, Hired | None], None]
    ) -> None:
        self._fleet, self._source, self._publish, self._hired = fleet, source, publish, hired
        self._hirer = ThreadPoolExecutor(1, "hirer")
        self._filling: set[int] = set()
        self._reshards = 0
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
                log.warning("passing over %s: %s", candidate if isinstance(candidate, Path) else "the first parameters", error)
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
        with self._held() as held:
            if held is not None:
                self._set_members(held.round + 1, tuple(sorted(seen.members | set(decision.ranks))), seen)

    def _set_members(self, first: int, ranks: tuple[int, ...], seen: policy.Seen) -> None:
        newest = max(seen.shards, key=lambda shard: shard.epoch)
        kept = tuple(entry for entry in newest.schedule if entry[0] < first)
        self._reign(newest.epoch + 1, (*kept, (first, ranks)))

    @contextmanager
    def _held(self) -> Iterator[Held | None]:
        """Hold all shards at one round, shard 0 first as everyone does; None where they cannot be had soon: another time, then."""
        fleet = self._fleet
        try:
            held = fleet.ask({0: Hold(_TOKEN)}, _HOLD_S)
            if all(isinstance(answer, Held) for answer in held.values()):
                held |= fleet.ask({index: Hold(_TOKEN) for index in range(1, len(fleet.shards))}, _HOLD_S)
            whole = len(held) == len(fleet.shards) and all(isinstance(answer, Held) for answer in held.values())
            newest = max((answer.round for answer in held.values()), default=0) if whole else 0
            late = {index: Advance(_TOKEN, newest) for index, answer in held.items() if whole and answer.round < newest}
            whole = whole and not any(fleet.ask(late, _HOLD_S).values())
            yield replace(held[0], round=newest, epoch=max(answer.epoch for answer in held.values())) if whole else None
        finally:
            fleet.ask_all(Release(_TOKEN))

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """Have new shards take the state over between two rounds; the old ones go on where that fails.

        Raises:
            ClusterError: no processes can be had for them, or an old one died meanwhile.
        """
        fleet, first = self._fleet, self._fleet.spec(0)
        specs = [replace(first, index=i, num_shards=num_shards, ranges=ranges) for i, ranges in enumerate(cuts)]
        new: list[Hired] = []
        try:
            for spec in specs:
                new.append(fleet.crew.hire(spec, standby=False, near=[*fleet.alive().values(), *new]))
            with self._held() as held:
                if held is None:
                    raise StepTimeout("reshard: the shards could not be held between two rounds; try again")
                old, ranges = list(fleet.shards), [spec.ranges for spec in fleet.specs]
                order = Load(held.epoch + 1, newest=dict(fleet.newest))
                for error in fleet.crew.move(_TOKEN, old, new, (ranges, cuts), order):
                    raise error
                spare = [*old, *fleet.standbys.values()]
                fleet.replace(specs, new)
                self._reshards, self._filling = self._reshards + 1, set()
                self._publish(None)
                fleet.crew.ask(dict(enumerate(old)), {index: Retire(held.epoch + 1) for index in range(len(old))}, ASK_S)
        except BaseException:
            for hired in new:
                fleet.crew.dismiss(hired)
            raise
        for hired in spare:
            fleet.crew.dismiss(hired)
        for hired in new:
            fleet.crew.watch(hired)

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
                self._hirer.submit(self._hire, self._reshards, index, fleet.spec(index), list(fleet.alive().values()))
                continue
            attached = fleet.ask({index: Attach(standby)}, _LOAD_S).get(index)
            if isinstance(attached, Exception):
                log.warning("shard %d: its standby could not be filled: %s", index, str(attached).splitlines()[-1])
                fleet.crew.fence(fleet.standbys.pop(index))

    def take_standby(self, reshards: int, index: int, hired: Hired | None) -> None:
        """Take a new standby that was hired, to be filled; one for a shard that is no more is let go."""
        if reshards != self._reshards:
            if hired is not None:
                self._fleet.crew.dismiss(hired)
            return
        self._filling.discard(index)
        if hired is not None:
            self._fleet.standbys[index] = hired
            self._fleet.crew.watch(hired)

    def _hire(self, reshards: int, index: int, spec: Any, near: list[Hired]) -> None:
        hired = None
        try:
            hired = self._fleet.crew.hire(spec, standby=True, near=near)
        except DistNadamError as error:
            log.warning("no standby for shard %d can be had: %s", index, error)
            time.sleep(_HIRE_AGAIN_S)
        self._hired(reshards, index, hired)
