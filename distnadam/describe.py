"""What a shard's machine says of itself, whatever phase it is in. Pure."""

from distnadam.ledger import DIRECT
from distnadam.machine import Machine
from distnadam.protocol.shard_status import Description
from distnadam.transitions import Phase


def described(shard: Machine, *, with_spec: bool = False) -> Description:
    """Return what `Describe` is answered."""
    members, needed = shard.members, shard.members.needed(shard.round + 1)
    return Description(
        spec=shard.spec if with_spec else None,
        epoch=shard.epochs.now,
        round=shard.round,
        iterations=shard.clock.iterations,
        skipped=shard.skipped,
        phase=shard.phase.value,
        waiting_for=tuple(rank for rank in needed if rank not in shard.pushed),
        left=tuple(sorted(members.left)),
        dead=tuple(sorted(members.dead)),
        members=needed,
        holder=shard.gate.holder,
        busy=shard.phase is Phase.OBEYING,
        lr=shard.config.lr,
        epoch_reason=shard.epochs.reason,
        schedule=members.schedule,
        newest=members.ledger.newest_of_all(),
        changed=shard.changed,
        given_up=tuple(sorted(members.given_up)),
        retired=shard.retired,
        here=members.here,
        furthest=shard.furthest,
        stepped=members.ledger.last(DIRECT),
    )
