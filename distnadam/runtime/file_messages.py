"""The messages by which a shard's state is written to files, which its machine does not get."""

from functools import partial
from typing import Any

from distnadam.places import above
from distnadam.protocol.delivery import Reply, RunWork
from distnadam.protocol.messages import Collect, Committed, FileMessage, Reserve, Save, Saved
from distnadam.runtime.answering import attempt
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.shard_files import ShardFiles
from distnadam.shard.machine import Shard

_KEPT = 8
"""Files whose checkpoints are not known to be complete: more than are written at a time."""


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
        self._uncommitted: dict[str, Saved] = {}  # by file name, the last one last

    def take(self, message: FileMessage, reply: Reply, run_work: RunWork) -> None:
        """Carry a message out, and answer it now or later."""
        if isinstance(message, Collect):
            self._files.collect(message.file_name, reply)
            return
        if isinstance(message, Committed):
            self._committed(message.file_name)
            reply(None)
            return
        work = self._files.reserve if isinstance(message, Reserve) else partial(self._save, message)
        run_work(lambda: reply(attempt(self._shard.spec.index, work)))

    def _save(self, message: Save) -> Any:
        outbox = self._outbox
        with outbox.lock:
            outbox.settle()
            self._shard.require_hold(message.token)
            saved = Saved(self._shard.progress.num_changes)
        if self._restored_from in (None, above(message.directory)):  # else nobody goes back to it
            self._uncommitted[message.file_name] = saved
            if len(self._uncommitted) > _KEPT:
                del self._uncommitted[next(iter(self._uncommitted))]
        return self._files.save(message, self._shard.state.arrays())

    def _committed(self, file_name: str) -> None:
        """Have the machine know what it need not lose any more; not before, since a checkpoint
        without a manifest is none.
        """
        if (saved := self._uncommitted.pop(file_name, None)) is None:
            return  # the shard of that time is gone
        outbox = self._outbox
        with outbox.lock:
            outbox.settle()
            must_send = outbox.queue_alone(self._shard.receive(saved, None))
        if must_send:
            outbox.send()
