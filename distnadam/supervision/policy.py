"""What to do when processes die, as data: an observation goes in, decisions come out. Pure: no I/O,
no clock.

The supervisor of an optimizer observes, asks `decide`, executes the decisions in their order, and
observes again; nothing is done to a process that is not decided here. The same observation always
gives the same decisions, so a successor decides as the dead supervisor would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distnadam.supervision.decisions import (
    AbandonRanks,
    Admit,
    Complete,
    CompleteConfig,
    Decision,
    Depart,
    DropStandbys,
    DropSuccessors,
    Fail,
    Fence,
    FillStandbys,
    FinishDeadWorkers,
    HandOver,
    Promote,
    ReleaseHold,
    ReportWorkersDied,
    Rewind,
    StartStandbys,
)
from distnadam.supervision.known_points import KnownPoints


@dataclass(frozen=True, kw_only=True)
class ShardObservation:
    """One shard.

    Args:
        alive: whether its process lives and answers.
        fenced: of a dead one: whether it can certainly do no harm any more.
        epoch: where it stands.
        reason: why that epoch began.
        round: the last round that it decided.
        schedule: the membership by round, as it has it.
        standby: the last round that its standby has; None without one that could take over.
        by_successor: of a dead one: whether that is what was to replace its standby.
        has_standby: whether there is a process for its standby, filled or not.
        has_successor: whether there is one that is to replace its standby.
        successor_unfilled: whether that could not be filled.
        filling: whether that process is being started or filled.
        stale: whether that process must not take over any more.
        revision: how often its hyper-parameters were replaced.
        applied_revision: that of its last applied step.
        leaves: whether its host is to be left.
        busy: whether it handles files.
        standby_leaves: whether its standby's host is to be left.
    """

    alive: bool
    fenced: bool = False
    epoch: int = 0
    reason: str = ""
    round: int = 0
    schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()
    standby: int | None = None
    by_successor: bool = False
    has_standby: bool = False
    has_successor: bool = False
    successor_unfilled: bool = False
    filling: bool = False
    stale: bool = False
    revision: int = 0
    applied_revision: int = 0
    leaves: bool = False
    busy: bool = False
    standby_leaves: bool = False


@dataclass(frozen=True, kw_only=True)
class Observation:
    """An optimizer as its supervisor sees it.

    Args:
        shards: in order.
        dead: seconds since each rank's worker died, of ranks that nobody took over.
        unfinished: those of them whose last push was not seen to yet.
        unreported: workers, by rank, that are gone without any shard knowing it: their incarnation.
        held: whether somebody acts on the optimizer as a whole right now.
        held_long: whether the same caller does for more than a moment.
        expired_hold: the token by which shards are held for somebody who is gone, or for too long.
        cannot_complete: whether shards stand at different rounds and nobody is left who could
            complete the earlier one.
        members: ranks that coming rounds need.
        asking: ranks that have a worker, perhaps for the first time, and want to be members.
        has_restore_point: whether there is a checkpoint, or `build`'s parameters, to go back to.
        would_lose: what was replaced from outside since then, which going back would lose; None:
            nothing.
        undoing_would_lose: what that would lose beside a last replacement that is half done.
        given_up: ranks whose waiters got WorkerLost.
        highest_round: the latest round that was ever decided; where shards went back from there,
            they replay what is recorded.
        known: the restore points, of which the executor takes one that can be loaded; not compared,
            as parameters may be among them.
    """

    shards: Sequence[ShardObservation]
    dead: Mapping[int, float] = field(default_factory=dict)
    unfinished: frozenset[int] = frozenset()
    unreported: Mapping[int, int] = field(default_factory=dict)
    held: bool = False
    held_long: bool = True
    expired_hold: str | None = None
    cannot_complete: bool = False
    members: frozenset[int] = frozenset()
    asking: frozenset[int] = frozenset()
    has_restore_point: bool = True
    would_lose: str | None = None
    undoing_would_lose: str | None = None
    given_up: frozenset[int] = frozenset()
    highest_round: int = 0
    known: KnownPoints = field(default_factory=KnownPoints, compare=False)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the user allows and wants.

    Args:
        rejoin_timeout_s: seconds for which a dead worker's rank is waited for.
        min_workers: ranks with which rounds go on; None: all are needed.
        replicas: standbys per shard, 0 or 1.
    """

    rejoin_timeout_s: float
    min_workers: int | None = None
    replicas: int = 0


def decide(seen: Observation, rules: Rules) -> list[Decision]:
    """Return what to do now, most urgent first; an empty list if nothing.

    Dead shards come first and alone. What makes no difference to the state of the shards may stand
    beside one decision that does.
    """
    gone = tuple(index for index, shard in enumerate(seen.shards) if not shard.alive)
    if gone:
        return _shards_died(seen, gone)
    first = _unblock(seen)
    torn = _torn(seen)
    if torn is not None:
        return first + torn
    if seen.cannot_complete:
        why = "some shards have applied a round that the others cannot complete"
        return first + _rewind(seen, (), why)
    decisions = first + _ranks(seen, rules) + _standbys(seen, rules)
    return decisions or _leaving(seen)


def _shards_died(seen: Observation, gone: tuple[int, ...]) -> list[Decision]:
    if running := tuple(index for index in gone if not seen.shards[index].fenced):
        return [Fence(running)]
    rounds = [shard.round if shard.alive else shard.standby for shard in seen.shards]
    known = [number for number in rounds if number is not None]
    if len(known) == len(rounds) and max(known) - min(known) <= 1:
        return [Promote(gone)]
    return _rewind(
        seen,
        gone,
        f"shard {', '.join(map(str, gone))} died without a standby that could step in",
    )


def _unblock(seen: Observation) -> list[Decision]:
    """What ends the waiting for somebody who is gone, whatever else there is to do."""
    decisions: list[Decision] = []
    if seen.expired_hold is not None:
        decisions.append(ReleaseHold(seen.expired_hold))
    if seen.unreported:
        decisions.append(ReportWorkersDied(tuple(sorted(seen.unreported.items()))))
    if seen.unfinished:
        decisions.append(FinishDeadWorkers(tuple(sorted(seen.unfinished))))
    stale = tuple(index for index, shard in enumerate(seen.shards) if shard.stale)
    if stale:
        decisions.append(DropStandbys(stale))
    return decisions


def _standbys(seen: Observation, rules: Rules) -> list[Decision]:
    """What gives every shard a standby that follows it; a stale one is dropped before.

    A shard that is to leave its host has one for the time being, whatever the rules say. A standby
    that is to leave its own follows until its successor does.
    """
    steady = [
        (index, shard, rules.replicas or shard.leaves)
        for index, shard in enumerate(seen.shards)
        if not shard.filling and not shard.stale
    ]
    drop = tuple(
        index
        for index, shard, wanted in steady
        if shard.has_standby and (not wanted or (shard.standby_leaves and shard.standby is None))
    )
    idle = [
        (index, shard)
        for index, shard, wanted in steady
        if wanted and shard.standby is None and index not in drop
    ]
    followed = [
        (index, shard)
        for index, shard, wanted in steady
        if wanted and shard.standby is not None and shard.has_standby
    ]
    start = [index for index, shard in idle if not shard.has_standby]
    start += [i for i, shard in followed if shard.standby_leaves and not shard.has_successor]
    fill = [index for index, shard in idle if shard.has_standby]
    failed = tuple(index for index, shard in followed if shard.successor_unfilled)
    fill += [i for i, shard in followed if shard.has_successor and i not in failed]
    decisions: list[Decision] = [DropStandbys(drop)] if drop else []
    decisions += [DropSuccessors(failed)] if failed else []
    decisions += [StartStandbys(tuple(sorted(start)))] if start else []
    return [*decisions, FillStandbys(tuple(sorted(fill)))] if fill else decisions


def _leaving(seen: Observation) -> list[Decision]:
    """What moves shards off hosts that are to be left, unless somebody acts on all shards for long:
    callers that follow each other closely are not waited out, but queued with.
    """
    ready = tuple(
        index
        for index, shard in enumerate(seen.shards)
        if shard.leaves
        and not shard.busy
        and not shard.filling
        and shard.standby is not None
        and shard.has_standby  # it may say of one that was just dropped that it follows
        and not shard.standby_leaves
    )
    return [HandOver(ready)] if ready and not (seen.held and seen.held_long) else []


def _torn(seen: Observation) -> list[Decision] | None:
    """What to do about a change that reached some shards only; None if there is no such change.

    A Reconfigure, and hyper-parameters by which no shard has stepped, are sent to the others;
    anything else was half done and is undone. While its author may yet complete it, nothing is
    decided that would make shards look equal.
    """
    newest = max(shard.epoch for shard in seen.shards)
    behind = tuple(index for index, shard in enumerate(seen.shards) if shard.epoch < newest)
    if not behind:
        latest = max(shard.revision for shard in seen.shards)
        behind = tuple(i for i, shard in enumerate(seen.shards) if shard.revision < latest)
        if not behind:
            return None
        stepped = any(shard.applied_revision == latest for shard in seen.shards)
        if stepped or len({shard.round for shard in seen.shards}) > 1:
            return _undo(seen, behind, "the configuration")
        return [] if seen.held else [CompleteConfig(behind)]
    if any(shard.epoch == 0 for shard in seen.shards):
        return _rewind(seen, (), "a shard that was started again has no state yet")
    if all(shard.reason == "rewound" for shard in seen.shards if shard.epoch == newest):
        why = f"shard {', '.join(map(str, behind))} has not gone back with the others"
        return [] if seen.held else _rewind(seen, (), why, undoing=seen.would_lose is not None)
    if all(shard.reason == "reconfigured" for shard in seen.shards if shard.epoch == newest):
        return [Complete(behind, newest)]
    return _undo(seen, behind, "the state")


def _undo(seen: Observation, behind: tuple[int, ...], what: str) -> list[Decision]:
    """Go back to before a replacement that these shards missed, once nobody completes it."""
    if seen.held:
        return []  # on its way
    why = (
        f"shard {', '.join(map(str, behind))} missed a replacement of {what} that others have taken"
    )
    return _rewind(seen, (), why, undoing=True)


def _rewind(
    seen: Observation, gone: tuple[int, ...], why: str, *, undoing: bool = False
) -> list[Decision]:
    if not seen.has_restore_point:
        return [
            Fail(
                f"{why}, and there is no checkpoint to go back to: save, set "
                "Options(checkpoint_dir=...), or use replicas=1"
            )
        ]
    lost = seen.undoing_would_lose if undoing else seen.would_lose
    if lost is not None:
        return [
            Fail(
                f"{why}, and {lost}, which going back to the last checkpoint would lose: save "
                "after such a change, or use replicas=1"
            )
        ]
    return [Rewind(gone, why, undoing=undoing)]


def _ranks(seen: Observation, rules: Rules) -> list[Decision]:
    decisions: list[Decision] = []
    replays = max(shard.round for shard in seen.shards) < seen.highest_round
    if seen.asking - seen.members and not replays:
        decisions.append(Admit(tuple(sorted(seen.asking - seen.members))))
    late = {
        rank
        for rank, seconds in seen.dead.items()
        if seconds >= rules.rejoin_timeout_s and rank in seen.members
    }
    if (
        late
        and rules.min_workers is not None
        and len(seen.members) - len(late) >= rules.min_workers
    ):
        decisions.append(Depart(tuple(sorted(late))))
    elif late - seen.given_up:
        decisions.append(AbandonRanks(tuple(sorted(late - seen.given_up))))
    return decisions
