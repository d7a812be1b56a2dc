"""What is to be done when processes die, as data: what was seen goes in, decisions come out. Pure:
no I/O, no clock.

The supervisor of an optimizer observes, asks `decide`, carries the decisions out in their order,
and observes again. The same observation always gives the same decisions, so a successor decides as
the dead one would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShardObservation:
    """One shard: whether its process lives, where it stands, and the last round its standby has
    (None: no standby that could step in).

    `changed` is what was replaced from outside since it was loaded or saved, as far as this shard
    has heard.
    """

    alive: bool
    epoch: int = 0
    reason: str = ""
    round: int = 0
    schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()
    standby: int | None = None
    changed: str | None = None


@dataclass(frozen=True)
class Observation:
    """An optimizer as its supervisor sees it.

    Args:
        shards: in order.
        dead: seconds since each rank's worker died, of ranks that nobody took over.
        held: whether somebody acts on the optimizer as a whole right now.
        stuck: whether shards stand at different rounds with nobody left who could complete the
            earlier one.
        members: ranks that coming rounds need.
        asking: ranks that have a worker again, or for the first time, and want to be members.
        source: whether there is a checkpoint, or `build`'s parameters, to go back to.
        changed: what was replaced from outside since that, which going back would lose; None:
            nothing.
        given_up: ranks whose waiters have been told.
        furthest: the latest round that was ever decided; where shards went back from there, they
            replay what is recorded.
    """

    shards: Sequence[ShardObservation]
    dead: Mapping[int, float] = field(default_factory=dict)
    held: bool = False
    stuck: bool = False
    members: frozenset[int] = frozenset()
    asking: frozenset[int] = frozenset()
    source: bool = True
    changed: str | None = None
    given_up: frozenset[int] = frozenset()
    highest_round: int = 0


@dataclass(frozen=True)
class Rules:
    """What the user allows."""

    rejoin_timeout_s: float
    min_workers: int | None = None


@dataclass(frozen=True)
class Promote:
    """The standbys of these shards take over."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class Rewind:
    """All shards go back together; these are made anew first."""

    shards: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Complete:
    """Shards that missed the latest reign are told it."""

    shards: tuple[int, ...]
    epoch: int


@dataclass(frozen=True)
class Depart:
    """These ranks are no members of the rounds that nobody has begun."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Admit:
    """These ranks are members from a boundary on."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class AbandonRanks:
    """Those who wait for these ranks are told that nobody comes."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Fail:
    """Nothing can be done; everyone is told why."""

    why: str


Decision = Promote | Rewind | Complete | Depart | Admit | AbandonRanks | Fail


def decide(seen: Observation, rules: Rules) -> list[Decision]:
    """Return what is to be done now, most urgent first; an empty list where all is well."""
    gone = tuple(index for index, shard in enumerate(seen.shards) if not shard.alive)
    if gone:
        return _shards_died(seen, gone)
    torn = _torn(seen)
    if torn is not None:
        return torn
    if seen.stuck:
        return _rewind(
            seen,
            (),
            "some shards have applied a round that the others cannot complete",
            seen.changed,
        )
    return _ranks(seen, rules)


def _shards_died(seen: Observation, gone: tuple[int, ...]) -> list[Decision]:
    rounds = [shard.round if shard.alive else shard.standby for shard in seen.shards]
    known = [number for number in rounds if number is not None]
    if len(known) == len(rounds) and max(known) - min(known) <= 1:
        return [Promote(gone)]
    return _rewind(
        seen,
        gone,
        f"shard {', '.join(map(str, gone))} died without a standby that could step in",
        seen.changed,
    )


def _torn(seen: Observation) -> list[Decision] | None:
    """A change that reached some shards only: a reign is told to the others, anything else was half
    done and is undone.

    None: there is no such change. While its author may yet complete it, nothing is decided that
    would make shards look equal.
    """
    newest = max(shard.epoch for shard in seen.shards)
    behind = tuple(index for index, shard in enumerate(seen.shards) if shard.epoch < newest)
    if not behind:
        return None
    if any(shard.epoch == 0 for shard in seen.shards):
        return _rewind(seen, (), "a shard that was made anew has no state yet", seen.changed)
    if all(shard.reason == "reconfigured" for shard in seen.shards if shard.epoch == newest):
        return [Complete(behind, newest)]
    if seen.held:
        return []  # on its way
    before = next(
        (seen.shards[index].changed for index in behind if seen.shards[index].changed is not None),
        None,
    )
    why = (
        f"shard {', '.join(map(str, behind))} missed a replacement of the state that others "
        "have taken"
    )
    return _rewind(seen, (), why, before)


def _rewind(
    seen: Observation, gone: tuple[int, ...], why: str, changed: str | None
) -> list[Decision]:
    if not seen.source:
        return [
            Fail(
                f"{why}, and there is no checkpoint to go back to: save, set "
                "Options(checkpoint_dir=...), or use replicas=1"
            )
        ]
    if changed is not None:
        return [
            Fail(
                f"{why}, and {changed}, which going back to the last checkpoint would lose: save "
                "after such a change, or use replicas=1"
            )
        ]
    return [Rewind(gone, why)]


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
