"""When a rank is taken over: which shards must count its last worker's push after all, since
another has counted it. Pure.
"""

from collections.abc import Mapping

from distnadam.protocol.messages import CompletePush, Joined


def adoptions(rank: int, joined: Mapping[int, Joined]) -> dict[int, CompletePush]:
    """Return, by shard, what must be adopted after every shard has refused the rank's predecessor
    (`joined` are their answers).

    A push that some shard has counted, or cannot take back any more, counts on all; one that waits
    everywhere counts nowhere.
    """
    notes = [answer.committed for answer in joined.values() if answer.committed is not None]
    if not notes:
        return {}
    last = max(notes, key=lambda note: note.round)
    behind = [
        shard
        for shard, answer in joined.items()
        if answer.round < last.round and answer.committed != last
    ]
    return {shard: CompletePush(rank, last) for shard in behind}
