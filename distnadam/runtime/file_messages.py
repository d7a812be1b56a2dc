"""The messages by which a shard's state is written to files, which its machine does not get."""

from functools import partial
from typing import Any

from distnadam.protocol.delivery import Reply, RunWork
from distnadam.protocol.messages import Collect, FileMessage, Reserve, Save
from distnadam.runtime.answering import attempt
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.shard_files import ShardFiles
from distnadam.shard.machine import Shard


class FileMessages:
    """Carries them out.

    Args:
        shard: the machine.
        outbox: of its host, with the lock.
        files: writes them.
    """

    def __init__(self, shard: Shard, outbox: Outbox, files: ShardFiles) -> None:
        self._shard = shard
        self._outbox = outbox
        self._files = files

    def take(self, message: FileMessage, reply: Reply, run_work: RunWork) -> None:
        """Carry a message out, and answer it now or later."""
        if isinstance(message, Collect):
            self._files.collect(message.file_name, reply)
            return
        work = self._files.reserve if isinstance(message, Reserve) else partial(self._save, message)
        run_work(lambda: reply(attempt(self._shard.spec.index, work)))

    def _save(self, message: Save) -> Any:
        outbox = self._outbox
        with outbox.lock:
            outbox.settle()
            self._shard.require_hold(message.token)
        return self._files.save(message, self._shard.state.arrays())
