"""What the shards do that keeps a call waiting, in words: who is late, busy or silent."""

import time
from collections.abc import Mapping
from typing import Any

from distnadam.backends.base import ShardTransport
from distnadam.errors import DistNadamError
from distnadam.protocol.messages import Describe, Message

_PATIENCE_S = 10.0
"""How long a shard may take to say where it stands, in seconds."""
_LOOK_S = 0.1
"""How long each may take at least, once that time is over for another."""


class ShardReports:
    """Asks every shard where it stands, for a sentence; waits for no round.

    Args:
        transport: reaches the shards.
    """

    def __init__(self, transport: ShardTransport) -> None:
        self._transport = transport

    def late(self, decided: int) -> str:
        """Return, for an error, which shards do not answer and which ranks have not pushed.

        Args:
            decided: the round before the one that is waited for.
        """
        missing, silent = set(), []
        for shard, status in self._ask_each(self._describe(), _PATIENCE_S).items():
            if isinstance(status, TimeoutError):
                silent.append(shard)
                continue
            if isinstance(status, Exception):
                raise status
            if status.round > decided:
                continue
            fates = dict.fromkeys(status.left, " (closed)") | dict.fromkeys(status.dead, " (died)")
            missing |= {f"{rank}{fates.get(rank, '')}" for rank in status.waiting_for}
        hung = f"shards {_listed(silent)} do not answer; " if silent else ""
        return f"{hung}still to push: ranks {', '.join(sorted(missing)) or 'none'}"

    def busy(self) -> str:
        """Return, for a call that waits for the shards, what each does that keeps it waiting."""
        doing: dict[str, list[int]] = {}
        for shard, status in self._ask_each(self._describe(), _PATIENCE_S).items():
            if isinstance(status, TimeoutError):
                what = "do not answer"
            elif isinstance(status, Exception):
                what = f"cannot be asked ({status})"
            elif status.busy:
                what = "read, write or copy their state"
            elif status.holder is not None:
                what = "are held between two rounds"
            else:
                what = f"are {status.phase}"
            doing.setdefault(what, []).append(shard)
        return "; ".join(f"shards {_listed(shards)} {what}" for what, shards in doing.items())

    def unanswered(self, messages: Mapping[int, Message]) -> str:
        """Return which shards do not answer idempotent messages at once, in words."""
        answers = self._ask_each(messages, 0.0)
        late = [shard for shard, answer in answers.items() if isinstance(answer, TimeoutError)]
        return f"for shards {_listed(late)}" if late else "for what follows them"

    def _ask_each(self, messages: Mapping[int, Message], patience_s: float) -> dict[int, Any]:
        """Return each shard's answer or error; TimeoutError if it has none in so many seconds."""
        deadline = time.monotonic() + patience_s
        asked = {
            shard: self._transport.post({shard: message}) for shard, message in messages.items()
        }
        answers: dict[int, Any] = {}
        for shard, pending in asked.items():
            try:
                left_s = max(_LOOK_S, deadline - time.monotonic())
                answers[shard] = pending.result(left_s)[shard]
            except (TimeoutError, DistNadamError) as error:
                answers[shard] = error
        return answers

    def _describe(self) -> dict[int, Message]:
        return dict.fromkeys(range(len(self._transport.cuts)), Describe())


def _listed(shards: list[int]) -> str:
    return ", ".join(map(str, shards))
