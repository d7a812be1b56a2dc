"""One rank's seat at all shards: joins, pulls, pushes, and sees a push through whatever dies
meanwhile. No trees, no maths, no Ray.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn, TypeVar

from distnadam.backends.base import Pending, WorkerChannel
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import (
    ConfigError,
    IllegalMessage,
    LatePush,
    Reconfigured,
    Rewound,
    ShardLost,
    ShardsDisagree,
    StaleEpoch,
    StepTimeout,
    SupersededWorker,
    WorkerLost,
)
from distnadam.nadam.norms import tensor_square_sums
from distnadam.protocol.messages import (
    Describe,
    Join,
    Joined,
    Leave,
    Message,
    PartialNorms,
    Pull,
    Push,
    RoundResult,
    TotalNorms,
)
from distnadam.protocol.orphaned_push import adoptions
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges


@dataclass
class InFlightPush:
    """A push that is not decided: what it is, the answers now awaited, and the norms of its round
    once they are known.

    `parts` gives the gradients of each shard's ranges, which stay as they are until the flight
    ends, whatever the shards are by then.
    """

    epoch: int
    round: int
    parts: Callable[[list[Ranges]], Sequence[Flat]]
    rejection: str | None
    want_parameters: bool
    pending: Pending | None = None
    square_sums: Any = None


_T = TypeVar("_T")


_POLL_S = 0.02


class WorkerSession:
    """See the module. `epoch` and `round` are the place in time that this rank last saw, -1 before;
    `buffer` holds its parameters.
    """

    def __init__(self, shards: ShardGroup, rank: int) -> None:
        self.rank, self._shards = rank, shards
        self._transport = shards.backend.transport
        self._supervisor = shards.backend.supervisor
        self._layout = shards.layout
        self._timeout_s = shards.options.step_timeout_s
        self.epoch = self.round = self._reached = -1
        self.buffer = 0
        self._rewound: int | None = None
        self._process = self._transport.new_token()
        self._incarnation = self._recovering(self._join)

    @cached_property
    def channel(self) -> WorkerChannel:
        """Made at first use, so that a worker which only travels to another process takes no memory
        here.
        """
        self._reached = self._transport.version  # before: what is newer is looked at again
        return self._transport.open_channel(
            self._layout, self._shards.ranges, self.rank, self._incarnation
        )

    @property
    def copies(self) -> bool:
        """Whether parameters are brought by answers, since not every shard shares its memory."""
        return self.channel.parameters is None

    def leave(self) -> None:
        """Depart after a whole step; views of the memory stay good."""
        try:
            self._ask(self._shards.for_all(Leave(self.rank, self._incarnation)))
        finally:
            if "channel" in self.__dict__:
                self.channel.close()

    def pull(self, *, want_parameters: bool) -> dict[int, RoundResult]:
        """Ask every shard where it stands until all stand at one round, and take that as this
        rank's place.
        """
        return self._recovering(lambda: self._pull(want_parameters))

    def prepare(
        self,
        parts: Callable[[list[Ranges]], Sequence[Flat]],
        rejection: str | None,
        *,
        want_parameters: bool,
    ) -> InFlightPush:
        """Return a push for the next round, which nobody has been sent yet."""
        if self.epoch < 0:
            self.pull(want_parameters=False)
        return InFlightPush(self.epoch, self.round + 1, parts, rejection, want_parameters)

    def send(self, push: InFlightPush) -> None:
        """Send every shard its part, without waiting."""
        try:
            self._send(push)
        except (ShardLost, Reconfigured):
            push.pending = None  # sent again when it is waited for

    def wait_for(self, push: InFlightPush) -> dict[int, RoundResult]:
        """Return how a push's round ended, whatever dies meanwhile, unless the state it was
        computed from is gone.
        """
        try:
            return self._see_through(push)
        except (WorkerLost, ConfigError, IllegalMessage) as error:
            if not self._new_incarnation(push, adopting=isinstance(error, WorkerLost)):
                raise
        try:
            return self._see_through(push)  # as a successor: gives the norms, and hears the end
        except LatePush:
            return self.pull(want_parameters=push.want_parameters)

    def _see_through(self, push: InFlightPush) -> dict[int, RoundResult]:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                if push.pending is None:
                    self._send(push)
                answers = self._conclude(push)
                if len({(decided.epoch, decided.round) for decided in answers.values()}) == 1:
                    return self._take(answers)
                if len({decided.epoch for decided in answers.values()}) == 1:
                    return self.pull(
                        want_parameters=push.want_parameters
                    )  # it counted long ago, and rounds go on without this rank
                # shards were replaced or went back between the answers; a push that counted may be
                # asked about again
                push.pending = None
                self._await(deadline, "the shards did not agree on an epoch")
            except Reconfigured as error:
                known, push.epoch, push.pending = push.epoch, max(push.epoch, error.epoch), None
                if (
                    error.epoch <= known
                    # other shards are yet to hear of it, or the round is to be decided without this
                    # rank
                ):
                    self._await(deadline, f"round {push.round} was not decided: {error}")
                self._transport.refresh()
                self._rejoin()
            except Rewound as error:
                self._rewound = max(self._rewound or 0, error.epoch)
                raise
            except ShardLost:
                push.pending = None
                self._transport.await_recovery(self._timeout_s)
                self._rejoin()
            except BaseException:
                push.pending = None  # a Ctrl-C may leave its answers half heard
                raise

    def _new_incarnation(self, push: InFlightPush, *, adopting: bool) -> bool:
        """Go on under a new number after a shard has dropped a push, since others may hold it, or
        be yet to get it.

        A rank, a number and a round name one gradient for ever: no shard can count the old one
        beside another that is pushed next. Return whether one had counted it already; then it
        counts on all, where that is to be seen to here.
        """
        old, self._incarnation = self._incarnation, self._incarnation + 1
        joined = self._recovering(lambda: self._ask_from_first(self._known()))
        notes = [answer.committed for answer in joined.values()]
        counted = adopting and any(
            note is not None and (note.incarnation, note.round) == (old, push.round)
            for note in notes
        )
        if counted:
            parts = push.parts(self._shards.ranges)
            self._adopt(joined, gradients=dict(enumerate(parts)))
        self._reconnect()
        return counted

    def _ask_from_first(self, join: Join) -> dict[int, Joined]:
        """Have shard 0 know of a worker before the others, as everybody does."""
        first = self._ask({0: join})
        return first | self._ask(dict.fromkeys(range(1, len(self._shards.ranges)), join))

    def _join(self) -> int:
        deadline = time.monotonic() + self._timeout_s
        while True:
            answers: dict[int, Joined] = self._ask({0: Join(rank=self.rank, process=self._process)})
            incarnation = answers[0].incarnation
            try:
                others = range(1, len(self._shards.ranges))
                answers |= self._ask(
                    {
                        i: Join(rank=self.rank, incarnation=incarnation, process=self._process)
                        for i in others
                    }
                )
                break
            except (
                SupersededWorker
            ):  # others know of a newer one, of which shard 0 has heard by now
                self._await(deadline, "the shards did not agree on who takes the rank over")
        self._adopt(answers)
        if not answers[0].member:
            self._await_admission()
        return incarnation

    def _adopt(
        self,
        joined: dict[int, Joined],
        in_flight: int = 0,
        gradients: Mapping[int, Flat] | None = None,
    ) -> None:
        """Have the rank's push that some shard counts count on all; not that of `in_flight`, a
        worker which sends it again.

        `gradients` are that push's, by shard, where they are at hand.
        """
        adopts = {
            shard: adopt
            for shard, adopt in adoptions(self.rank, joined).items()
            if adopt.note.incarnation != in_flight
        }
        if gradients is not None:
            adopts = {
                i: replace(a, gradients=None if a.note.rejection else gradients[i])
                for i, a in adopts.items()
            }
        try:
            self._ask(dict(adopts))
        except IllegalMessage as error:
            self._supervisor.report_cannot_complete()
            raise ShardLost(f"{error}; all shards must go back") from error

    def _await_admission(self) -> None:
        """Wait until the supervisor has made this rank a member again, at a boundary of its
        choice.
        """
        deadline = time.monotonic() + self._timeout_s
        while self.rank not in self._ask({0: Describe()})[0].members:
            self._await(deadline, "was not admitted as a member")

    def _await(self, deadline: float, what: str) -> None:
        """Let a moment pass, unless the time is over."""
        if time.monotonic() > deadline:
            raise StepTimeout(f"worker {self.rank}: {what} in {self._timeout_s:g} s")
        time.sleep(_POLL_S)

    def _pull(self, want_parameters: bool) -> dict[int, RoundResult]:
        at_least = epoch = 0
        deadline = time.monotonic() + self._timeout_s
        while True:
            if self._is_elsewhere():
                # lanes to shards that hold nothing any more would bring parameters that nobody
                # steps
                self._reconnect()
            want = want_parameters and self.copies
            answers = self._ask(
                self._shards.for_all(
                    Pull(
                        rank=self.rank,
                        incarnation=self._incarnation,
                        at_least=at_least,
                        want_parameters=want,
                        epoch=epoch,
                    )
                )
            )
            at_least, epoch = (
                max(d.round for d in answers.values()),
                max(d.epoch for d in answers.values()),
            )
            if any(
                d.epoch != epoch for d in answers.values()
            ):  # something is on its way: rounds of two epochs say nothing
                at_least = 0
                self._await(deadline, "the shards did not agree on an epoch")
                continue
            if self._is_elsewhere():
                continue
            if all(d.round == at_least for d in answers.values()):
                return self._take(answers)
            joined = self._ask(self._shards.for_all(self._known()))
            self._adopt(joined)  # a shard may have died with what it must count
            if any(answer.orphaned for answer in joined.values()):
                self._norms_are_gone(at_least)

    def _send(self, push: InFlightPush) -> None:
        """Send a push to every shard; one that has counted it already says so."""
        rejected = push.rejection is not None
        push.pending = self.channel.post(
            {
                index: Push(
                    epoch=push.epoch,
                    rank=self.rank,
                    incarnation=self._incarnation,
                    round=push.round,
                    gradients=None if rejected else part,
                    rejection=push.rejection,
                    want_parameters=push.want_parameters and self.copies,
                )
                for index, part in enumerate(push.parts(self._shards.ranges))
            }
        )

    def _conclude(self, push: InFlightPush) -> dict[int, RoundResult]:
        """Wait for the answers, the second phase included where clipping needs norms."""
        assert push.pending is not None
        answers = self._wait(push.pending)
        while measured := {
            shard: answer.sums
            for shard, answer in answers.items()
            if isinstance(answer, PartialNorms)
        }:
            if len(measured) == len(answers):
                push.square_sums = tensor_square_sums(
                    len(self._layout.tensors), [measured[shard] for shard in sorted(measured)]
                )
            if push.square_sums is None:
                self._norms_are_gone(push.round)
            want = push.want_parameters and self.copies
            norms = TotalNorms(
                epoch=push.epoch,
                rank=self.rank,
                incarnation=self._incarnation,
                round=push.round,
                square_sums=push.square_sums,
                want_parameters=want,
            )
            push.pending = self.channel.post(dict.fromkeys(measured, norms))
            answers = answers | self._wait(push.pending)
        return answers

    def _norms_are_gone(self, number: int) -> NoReturn:
        """Have all go back: a round was applied by some shards, and nobody has the norms that the
        others need.
        """
        self._supervisor.report_cannot_complete()
        raise ShardLost(
            f"worker {self.rank}: the norms of round {number} went with who had them; all must go "
            "back"
        )

    def _rejoin(self) -> None:
        """Be known to the shards as they are now, and reach them where they are."""
        self._recovering(
            lambda: self._adopt(self._ask(self._shards.for_all(self._known())), self._incarnation)
        )
        self._reconnect()

    def _is_elsewhere(self) -> bool:
        """Whether the shards, as far as this process has heard, are not where its lanes lead."""
        return "channel" in self.__dict__ and self._reached != self._transport.version

    def _reconnect(self) -> None:
        """Reach the shards where they are now."""
        if "channel" in self.__dict__:
            self._reached = self._transport.version
            self.channel.reconnect(self._shards.ranges, self._incarnation)

    def _known(self) -> Join:
        return Join(rank=self.rank, incarnation=self._incarnation, process=self._process)

    def _recovering(self, work: Callable[[], _T]) -> _T:
        """Do what may be done again from its beginning, as often as shards die meanwhile."""
        while True:
            try:
                return work()
            except ShardLost:
                self._transport.await_recovery(self._timeout_s)
            except Reconfigured:
                self._transport.refresh()
            except Rewound:
                raise  # this rank has not been told yet
            except StaleEpoch:
                continue  # it waited while the state was replaced, and asks again

    def _take(self, answers: dict[int, RoundResult]) -> dict[int, RoundResult]:
        """Take the place in time that all shards stand at; raise ShardsDisagree where they do
        not.
        """
        first = answers[0]
        for index, other in answers.items():
            if (other.round, other.outcome, other.lr, other.buffer) != (
                first.round,
                first.outcome,
                first.lr,
                first.buffer,
            ):
                raise ShardsDisagree(
                    f"shard 0 {first.outcome} round {first.round} with lr={first.lr!r}, shard "
                    f"{index} {other.outcome} round {other.round}"
                    f" with lr={other.lr!r}; a learning-rate function must give every shard the "
                    "same rate for the same step"
                )
        known, self._rewound = self._rewound, max(answer.rewound for answer in answers.values())
        self._shards.knows_rewound(self._rewound)
        if known is not None and self._rewound > known:
            self.epoch = -1
            told = (
                f"worker {self.rank}: all shards went back after a death, to round "
                f"{first.round}; compute again from there"
            )
            raise Rewound(told, first.epoch, first.round)
        self.epoch, self.round, self.buffer = first.epoch, first.round, first.buffer
        return answers

    def _ask(self, messages: dict[int, Message]) -> dict[int, Any]:
        return self._wait(self._transport.post(messages)) if messages else {}

    def _wait(self, pending: Pending) -> dict[int, Any]:
        try:
            return pending.result(self._timeout_s)
        except TimeoutError as error:
            told = (
                f"worker {self.rank}: round {self.round + 1} was not decided in "
                f"{self._timeout_s:g} s"
            )
            raise StepTimeout(f"{told}; {self._shards.who_is_late(self.round)}") from error
