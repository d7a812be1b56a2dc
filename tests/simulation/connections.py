"""Connections between a world's hosts: what TCP and a host's relay are to both ends' processes.

A connection carries the messages of all ranks of its host to one process, in order, each with a
copy of its gradients. It may end at any byte without anybody's death: what it was asked is then
asked again by a call, while what was on its way is lost, arrives nevertheless, or arrives late.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distnadam.protocol.messages import GroupPush, Push

if TYPE_CHECKING:
    from tests.simulation.world import Process, World


@dataclass(eq=False)
class _Asked:
    """A message, and the answer that its sender waits for."""

    message: Any
    answer: Future[Any]


class Connection:
    """One host's connection to a shard's process."""

    def __init__(self, world: "World", process: "Process") -> None:
        self._world, self._process = world, process
        self._asked: list[_Asked] = []
        self._on_its_way: deque[_Asked] = deque()
        self._stalls = False
        self.is_open = True

    def send(self, message: Any, fault: str) -> Future[Any]:
        """Send a message the way that a fault says."""
        self._world.note("sent")
        outer: Future[Any] = Future()
        asked = _Asked(copied(message), outer)
        self._asked.append(asked)
        self._on_its_way.append(asked)
        match fault:
            case "lose" | "half":
                self._on_its_way.pop()
                if fault == "half" and isinstance(message, Push) and message.gradients is not None:
                    self._world.note("half sent")
                self.end()
            case "lose answer":
                self._note_arrival("arrived, then asked again")
                self.end(self._flow)
            case "repeat":
                self._note_arrival("asked again, then arrived late")
                late = [each.message for each in self._on_its_way]
                self.end()
                self._world.late.append(lambda: self._arrive_late(late))
            case "delay":
                self._world.note("stalled")
                self._stalls = True
                self._world.late.append(self._go_on)
            case "delay answer":
                self._flow(hold=asked)
        if self.is_open and not self._stalls:
            self._flow()
        return outer

    def end(self, before: Callable[[], None] = lambda: None) -> None:
        """End the connection, after what may still arrive; ask all that is unanswered by a call."""
        self.is_open = False
        before()
        self._on_its_way.clear()
        asked, self._asked = self._asked, []
        ranks = {rank for each in asked for rank in workers_of(each.message)}
        if ranks:
            self._world.note("ended under several ranks" if len(ranks) > 1 else "ended")
        for each in asked:
            if not each.answer.done():
                pass_on(self._process.send(each.message), each.answer)

    def _note_arrival(self, what: str) -> None:
        if self._process.alive:
            self._world.note(what)

    def _go_on(self) -> None:
        self._stalls = False
        if self.is_open:
            self._flow()

    def _flow(self, hold: _Asked | None = None) -> None:
        """Have what is on its way arrive, in order; keep one answer back, if so said."""
        while self._on_its_way:
            asked = self._on_its_way.popleft()
            answer = self._process.send(asked.message)
            if asked is hold:
                self._hold(asked, answer)
            else:
                answer.add_done_callback(lambda done, asked=asked: self._answer(asked, done))

    def _hold(self, asked: _Asked, answer: Future[Any]) -> None:
        """Have an answer arrive late, or never, if the connection has ended by then."""

        def arrive() -> None:
            if asked.answer.done():
                self._world.note("overtaken answer")
            else:
                answer.add_done_callback(lambda done: self._answer(asked, done))

        self._world.late.append(arrive)

    def _answer(self, asked: _Asked, answer: Future[Any]) -> None:
        if not self.is_open or asked.answer.done():
            return  # it is asked again by a call
        self._asked.remove(asked)
        pass_on(answer, asked.answer)

    def _arrive_late(self, messages: list[Any]) -> None:
        """Deliver what an ended connection still held; nobody hears the answers."""
        for message in messages:
            shard = self._process.host.shard if self._process.host is not None else None
            if self._process.alive and shard is not None:
                stale = message.epoch != shard.epochs.now
                self._world.note("late, of another epoch" if stale else "late")
                for rank, incarnation in workers_of(message).items():
                    if self._world.incarnations.get(rank, incarnation) != incarnation:
                        self._world.note("late, of another incarnation")
            self._process.send(message)


def workers_of(message: Any) -> dict[int, int]:
    """Return the incarnation of each rank whose message it is, which are several in a group's."""
    if isinstance(message, GroupPush):
        return {rank: note.incarnation for rank, note in message.members.items()}
    return {message.rank: message.incarnation}


def copied(message: Any) -> Any:
    """Return a message with its own copy of the gradients, as one that leaves its host has."""
    if getattr(message, "gradients", None) is None:
        return message
    return replace(
        message, gradients={space: array.copy() for space, array in message.gradients.items()}
    )


def pass_on(inner: Future[Any], outer: Future[Any]) -> None:
    """Give one future's end to another, unless that has one."""

    def done(answered: Future[Any]) -> None:
        if outer.done():
            return
        error = answered.exception()
        outer.set_exception(error) if error is not None else outer.set_result(answered.result())

    inner.add_done_callback(done)
