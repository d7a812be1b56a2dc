"""The messages by which a shard's state is written to files, which its machine does not get."""

from functools import partial
from typing import Any

from distnadam.places import above
from distnadam.protocol.delivery import Reply, RunWork
from distnadam.protocol.messages import Collect, FileMessage, Reserve, Save, Saved
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
        restored_from: the directory of checkpoints that a rewind goes back to; None for any.
    """

    def __init__(
        self,
        shard: Shard,
        outbox: Outbox,
        files: ShardFiles,
        restored_from: str | None,
    ) -> None:
        self._shard = shard
        self._outbox = outbox
        self._files = files
        self._restored_from = restored_from

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
            saved = Saved(self._shard.progress.num_changes)
        return self._files.save(
            message, self._shard.state.arrays(), lambda: self._written(message, saved)
        )

    def _written(self, message: Save, saved: Saved) -> None:
        if self._restored_from not in (None, above(message.directory)):
            return  # nobody goes back to what is there
        outbox = self._outbox
        with outbox.lock:
            outbox.settle()
            must_send = outbox.queue_alone(self._shard.receive(saved, None))
        if must_send:
            outbox.send()
