"""When a worker is replaced: which shards must count its last push, since another has. Pure."""

from collections.abc import Mapping

from distnadam.protocol.messages import CompletePush, Joined


def orphaned_pushes(rank: int, joined: Mapping[int, Joined]) -> dict[int, CompletePush]:
    """Return, by shard, the push to complete, from every shard's answer to the successor's `Join`.

    A push that some shard has counted, or is certain to count, counts on all; one that only waits
    counts nowhere.
    """
    notes = [answer.committed for answer in joined.values() if answer.committed is not None]
    if not notes:
        return {}
    last = max(notes, key=lambda note: note.round)
    lacking = [
        shard
        for shard, answer in joined.items()
        if answer.round < last.round and answer.committed != last
    ]
    return {shard: CompletePush(rank, last) for shard in lacking}
