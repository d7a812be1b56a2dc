"""An event loop in a thread of its own, in which the connections between hosts are served."""

import asyncio
import threading
from contextlib import suppress
from typing import Any

from distnadam.errors import LaneError
from distnadam.threads import start
from distnadam.transport.turns import Turns


class LoopThread:
    """An event loop in a thread of its own.

    Attributes:
        loop: the event loop.
        turns: of the loop's connections.

    Raises:
        LaneError: the system has no thread or descriptor for it.
    """

    def __init__(self) -> None:
        try:
            self.loop = asyncio.new_event_loop()
            self.turns = Turns(self.loop.call_soon)
            self._thread = threading.Thread(target=self._run, name="tcp", daemon=True)
            start(self._thread)
        except (OSError, RuntimeError) as error:
            raise LaneError(f"no thread for connections: {error}") from error

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def call(self, what: Any, *args: Any) -> None:
        """Call something in the loop's thread: now if that is this one, else some time.

        Do nothing once the loop is closed.
        """
        if threading.get_ident() == self._thread.ident:
            what(*args)
            return
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(what, *args)

    def close(self) -> None:
        """End the thread."""
        self.call(self.loop.stop)
        self._thread.join()

    def run(self, coroutine: Any, timeout_s: float) -> Any:
        """Return the result of a coroutine of the loop; TimeoutError if it takes longer."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise
