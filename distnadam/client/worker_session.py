"""One rank's place in time at all shards: pulls, pushes, and waits for a push whatever dies.

It knows flat arrays, rounds and epochs. No trees, no maths, no Ray.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from distnadam.backends.base import Pending, WorkerChannel
from distnadam.client.answers import common_of, late_answers, shards_disagree
from distnadam.client.in_flight_push import REFUSED, InFlightPush, refusal_of
from distnadam.client.push_ahead import PushAhead
from distnadam.client.rank_claim import RankClaim
from distnadam.client.rewind_guard import RewindGuard
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import (
    ConfigError,
    DistNadamError,
    IllegalMessage,
    LatePush,
    Reconfigured,
    Rewound,
    ShardLost,
    StepTimeout,
    WorkerLost,
)
from distnadam.nadam.norms import tensor_square_sums
from distnadam.protocol.messages import NO_NORM, PartialNorms, Pull, Push, RoundResult, TotalNorms
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges
from distnadam.waiting import REPORT_WAIT_S


class WorkerSession:
    """What one worker knows of the shards, and its push in flight.

    `epoch` and `round` are where all shards stood when this worker last looked, and `buffer` holds
    that round's parameters. They hold only while `in_sync`; else the next call that needs them
    looks again: before the first pull, and after a push that failed. `is_readable` says whether the
    channel's memory holds them: not if only the round was asked for, nor another channel's.

    Args:
        shards: the shards.
        rank: the rank to take over.
        receive: gets the parameters that answers bring, by shard.
    """

    def __init__(self, shards: ShardGroup, rank: int, receive: Callable[[int, Flat], None]) -> None:
        self.rank = rank
        self.epoch = self.round = self.buffer = 0
        self.lr = 0.0  # of the last step
        self.outcome = "applied"  # of the last round
        self.pushed_at = 0.0  # by `time.perf_counter`, when the last push began to be sent
        self.loss_scale: float | None = None  # of the next round; 0 if there is none
        self.gradient_norm = NO_NORM  # of the last round
        self.in_sync = self.is_readable = False
        self.in_flight: InFlightPush | None = None
        self._shards = shards
        self._receive = receive
        self._transport = shards.backend.transport
        self._channel_version: int | None = None
        self._timeout_s = shards.options.step_timeout_s
        self.ranges: list[Ranges] = []  # that the channel leads to
        self.rewinds = RewindGuard(f"worker {rank}: ")
        self.ahead = PushAhead(self)
        with shards.backend.shield:
            self._claim = RankClaim(shards, rank)

    @property
    def incarnation(self) -> int:
        """The number of this worker among those that had the rank."""
        return self._claim.incarnation

    @cached_property
    def channel(self) -> WorkerChannel:
        """The connection to all shards.

        Made at first use, so that a worker that only travels to another process takes no memory.
        """
        self._channel_version = self._transport.version  # before: what is newer is looked at again
        self.ranges = self._shards.ranges
        return self._transport.open_channel(
            self._shards.layout, self.ranges, self.rank, self.incarnation
        )

    def leave(self) -> None:
        """Depart after a whole step; views of the memory stay valid."""
        try:
            with self._shards.backend.shield:
                self._claim.leave()
        finally:
            if self._channel_version is not None:
                self.channel.close()

    def sync(self) -> None:
        """Learn where the shards stand, if this worker does not know."""
        if not self.in_sync:
            self.pull(want_parameters=False)

    def pull(self, *, want_parameters: bool) -> RoundResult:
        """Ask every shard until all stand at one round; return that, and stand there.

        Raises:
            Rewound: the shards went back since this worker last looked.
        """
        try:
            with self._shards.backend.shield:
                return self._shards.retry.run(lambda: self._pull(want_parameters=want_parameters))
        except Rewound as error:
            self._acknowledge(error.epoch)
            raise

    def push(
        self,
        parts: Callable[[list[Ranges]], Sequence[Flat]],
        rejection: str | None,
        *,
        want_parameters: bool,
        settings: RoundSettings = ORDINARY,
        is_ahead: bool = False,
    ) -> InFlightPush:
        """Send every shard its part of a push for the next round, without waiting.

        The arguments are those of `InFlightPush`, and whether what `ahead` has sent is of it.
        """
        self.sync()
        push = InFlightPush(self.epoch, self.round + 1, parts, rejection, want_parameters, settings)
        if self.ahead.written:
            push.slices = self.ahead.take_counts(is_pushed=is_ahead)
        self.in_flight = push  # before it is sent: a Ctrl-C may leave it half sent
        self.pushed_at = time.perf_counter()
        try:
            self._send(push)
        except (ShardLost, Reconfigured):
            push.pending = None  # it is sent again when it is waited for
        return push

    def wait_for(self, push: InFlightPush, timeout_s: float | None = None) -> RoundResult:
        """Return how a push's round ended, whatever dies meanwhile, or raise why it failed.

        Args:
            push: a push of this session.
            timeout_s: seconds to wait, in place of `Options.step_timeout_s`.

        Raises:
            StepTimeout: the round was not decided in time; the push is still in flight.
        """
        with self._shards.backend.shield:
            if timeout_s is not None and push.ended is None:
                return self._wait_within(push, timeout_s)
            if push.ended is None:
                try:
                    try:
                        result = self._wait(push)
                    except (WorkerLost, ConfigError, IllegalMessage) as error:
                        result = self._wait_as_successor(push, error)
                    # the answer may tell of a later round, once that is decided too
                    is_refused = result.outcome in REFUSED and result.round == push.round
                    push.ended = refusal_of(result) if is_refused else result
                except StepTimeout:
                    raise
                except DistNadamError as error:
                    self.in_sync = False
                    push.ended = error
            push.pending = None
            if self.in_flight is push:
                self.in_flight = None
        if isinstance(push.ended, DistNadamError):
            raise push.ended
        return push.ended

    def _wait_within(self, push: InFlightPush, timeout_s: float) -> RoundResult:
        usual, self._timeout_s = self._timeout_s, timeout_s
        try:
            return self.wait_for(push)
        finally:
            self._timeout_s = usual

    def _wait_as_successor(self, push: InFlightPush, error: DistNadamError) -> RoundResult:
        """Wait for a dropped push as a new incarnation; raise the error if no shard counted it."""
        counted = self._claim.renew(push, adopting=isinstance(error, WorkerLost))
        self._reconnect()
        if not counted:
            raise error
        try:
            return self._wait(push)  # gives the norms, and learns the end
        except LatePush:
            return self.pull(want_parameters=push.want_parameters)

    def _wait(self, push: InFlightPush) -> RoundResult:
        """Wait for a push, and send it again to shards that were replaced meanwhile."""
        began = time.monotonic()
        while True:
            try:
                answers = self._answers(push.pending or self._send(push))
                is_common = len(set(map(id, answers.values()))) == 1
                if is_common and isinstance(answers[0], RoundResult):
                    return self._stand_at(answers)  # nearly always
                if any(isinstance(answer, PartialNorms) for answer in answers.values()):
                    answers = self._give_norms(push, answers)
                epochs = {answer.epoch for answer in answers.values()}
                rounds = {answer.round for answer in answers.values()}
                if len(epochs) == len(rounds) == 1:
                    return self._stand_at(answers)
                if len(epochs) == 1:  # it counted long ago, and rounds went on without this rank
                    return self.pull(want_parameters=push.want_parameters)
                push.pending = None  # shards were replaced or went back between the answers
                self._pause(began, "the shards did not agree on an epoch")
            except (ShardLost, Reconfigured) as error:
                self._follow(push, error, began)
            except Rewound as error:
                self._acknowledge(error.epoch)
                raise
            except BaseException:
                push.pending = None  # a Ctrl-C may leave its answers half heard
                raise

    def _follow(self, push: InFlightPush, error: ShardLost | Reconfigured, began: float) -> None:
        """Reach the shards that replaced those of a push, so that it is sent again."""
        push.pending = None
        if isinstance(error, Reconfigured):
            known = push.epoch
            push.epoch = max(known, error.epoch)
            if error.epoch <= known:
                # other shards do not know of it yet, or the round goes without this rank
                self._pause(began, f"round {push.round} was not decided: {error}")
        self._shards.retry.recover(error, self._transport.version)
        self._claim.rejoin()
        self._reconnect()

    def _pull(self, *, want_parameters: bool) -> RoundResult:
        at_least = epoch = 0
        began = time.monotonic()
        while True:
            if self._is_elsewhere():
                self._reconnect()  # retired shards would bring parameters that nobody steps
            message = Pull(
                rank=self.rank,
                incarnation=self._claim.incarnation,
                at_least=at_least,
                want_parameters=want_parameters and self.channel.parameters is None,
                epoch=epoch,
            )
            try:
                answers = self._ask_all(message)
            except ShardLost:
                self._forget_connections()
                raise
            at_least = max(answer.round for answer in answers.values())
            epoch = max(answer.epoch for answer in answers.values())
            if any(answer.epoch != epoch for answer in answers.values()):
                at_least = 0  # rounds of two epochs cannot be compared
                self._pause(began, "the shards did not agree on an epoch")
            elif self._is_elsewhere():
                continue
            elif all(answer.round == at_least for answer in answers.values()):
                if self._claim.is_settled(epoch):
                    return self._stand_at(answers)
            elif self._claim.complete_orphans():  # a shard may have died with what it must count
                self._lost_norms(at_least)

    def _send(self, push: InFlightPush) -> Pending:
        """Send a push to every shard; one that has counted it already says so."""
        channel = self.channel
        message = Push(
            epoch=push.epoch,
            rank=self.rank,
            incarnation=self._claim.incarnation,
            round=push.round,
            gradients=None,
            rejection=push.rejection,
            want_parameters=push.want_parameters and channel.parameters is None,
            settings=push.settings,
        )
        pending = channel.post_push(message, push.parts(self.ranges), push.slices)
        push.pending = pending
        push.slices = {}
        return pending

    def _give_norms(self, push: InFlightPush, answers: dict[int, Any]) -> dict[int, RoundResult]:
        """Carry out the second phase, in which the shards that measured get the whole norms."""
        while measured := {
            shard: answer.sums
            for shard, answer in answers.items()
            if isinstance(answer, PartialNorms)
        }:
            if len(measured) == len(answers):
                push.square_sums = tensor_square_sums(
                    len(self._shards.layout.tensors),
                    [measured[shard] for shard in sorted(measured)],
                )
            if push.square_sums is None:
                self._lost_norms(push.round)
            norms = TotalNorms(
                epoch=push.epoch,
                rank=self.rank,
                incarnation=self._claim.incarnation,
                round=push.round,
                square_sums=push.square_sums,
                want_parameters=push.want_parameters and self.channel.parameters is None,
            )
            push.pending = self.channel.post(dict.fromkeys(measured, norms))
            answers = answers | self._answers(push.pending)
        return answers

    def _lost_norms(self, round: int) -> None:
        """Have all shards go back: some applied a round whose norms the others cannot get."""
        self._shards.go_back(
            f"worker {self.rank}: the norms of round {round} were lost with the workers that had "
            "them; all must go back"
        )

    def _pause(self, began: float, problem: str) -> None:
        self._shards.retry.pause(began, f"worker {self.rank}: {problem}")

    def _is_elsewhere(self) -> bool:
        """Whether this process knows of a newer place of the shards than the channel leads to."""
        return self._channel_version not in (None, self._transport.version)

    def _forget_connections(self) -> None:
        """Have the next pull connect anew, also where no shard has moved: a relay may have died."""
        if self._channel_version is not None:
            self._channel_version = -1

    def _reconnect(self) -> None:
        """Reach the shards where they are now."""
        if self._channel_version is not None:
            self.is_readable = False
            self._channel_version = self._transport.version
            self.ranges = self._shards.ranges
            self.channel.reconnect(self.ranges, self.incarnation)

    def _stand_at(self, answers: Mapping[int, RoundResult]) -> RoundResult:
        """Take over the round and the parameters that all shards stand at, and return shard 0's.

        Raises:
            ShardsDisagree: they do not stand at the same.
            Rewound: they went back since this worker last looked.
        """
        first = answers[0]
        for index, other in answers.items():
            if other is not first and common_of(other) != common_of(first):
                raise shards_disagree(first, index, other)
        rewound = max([answer.rewound for answer in answers.values()])
        if rewound != self.rewinds.known:
            self._shards.rewinds.acknowledge(rewound)
            self.in_sync = False
            self.rewinds.check(rewound, epoch=first.epoch, round=first.round)
        for index, answer in answers.items():
            if answer.parameters is not None:
                self._receive(index, answer.parameters)
        self.stand(first)
        self.is_readable = self._channel_version is not None
        return first

    def stand(self, result: RoundResult) -> None:
        """Stand where a round ended on all shards."""
        self.epoch = result.epoch
        self.round = result.round
        self.buffer = result.buffer
        self.lr = result.lr
        self.outcome = result.outcome
        self.loss_scale = result.loss_scale
        self.gradient_norm = result.gradient_norm
        self.in_sync = True

    def _acknowledge(self, epoch: int) -> None:
        """Record that this worker's user, who is the handle's too, gets a `Rewound` of an epoch."""
        self.rewinds.acknowledge(epoch)
        self._shards.rewinds.acknowledge(epoch)

    def _ask_all(self, message: Pull) -> dict[int, RoundResult]:
        messages: dict[int, Pull] = dict.fromkeys(range(len(self._shards.ranges)), message)
        if self._channel_version is not None and self.channel.relayed:
            return self._answers(self.channel.post(messages))
        return self._answers(self._transport.post(messages))

    def _answers(self, pending: Pending) -> dict[int, Any]:
        """Return the answers; log once whom this worker waits for, if it waits long.

        Raises:
            StepTimeout: they did not all come in time.
        """
        timeout_s = self._timeout_s
        try:
            try:
                return pending.result(min(REPORT_WAIT_S, timeout_s))
            except TimeoutError:
                who = f"worker {self.rank}, round {self.round + 1}"
                return late_answers(
                    pending, timeout_s, who, lambda: self._shards.reports.late(self.round)
                )
        except TimeoutError as error:
            raise StepTimeout(
                f"worker {self.rank}: round {self.round + 1} was not decided in "
                f"{timeout_s:g} s; {self._shards.reports.late(self.round)}"
            ) from error
