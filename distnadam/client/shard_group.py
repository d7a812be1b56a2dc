"""Acting on all shards as one optimizer: pause them at one round, then read, write or load; and
direct steps.

Shard 0 is paused first and the others after it, so that two clients that act at once queue there
and never wait for each other in a ring. No maths, no Ray.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from distnadam import waiting
from distnadam.backends.base import Backend
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.shard_file import leftover_readers
from distnadam.checkpoint.storage.base import Directory
from distnadam.client.answers import late_answers
from distnadam.client.direct_step import DIRECT_CALL, DirectStep, DirectSteps
from distnadam.client.retry import Retry
from distnadam.client.rewind_guard import RewindGuard
from distnadam.client.shard_reports import ShardReports
from distnadam.config import Options, changed_config
from distnadam.errors import (
    ConfigError,
    DistNadamError,
    Rewound,
    ShardLost,
    ShardUnavailable,
    StepTimeout,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import Betas, BetasByGroup, Rates, packed_overrides
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import (
    CatchUp,
    Describe,
    Description,
    Message,
    Paused,
    Read,
    Resume,
    RoundResult,
    SetConfig,
    Write,
)
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.supervisor_messages import Load, Order
from distnadam.supervision.pause import all_paused, lagging
from distnadam.tensors.arrays import Flat, cut_flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from distnadam.waiting import said_if_long

_T = TypeVar("_T")
IO_TIMEOUT_S = 24 * 3600.0
"""Seconds in which shards read or write a checkpoint."""


@dataclass(frozen=True)
class Boundary:
    """All shards paused at one round: the token that pauses them, and where they stand."""

    token: str
    held: Paused


class ShardGroup:
    """The shards of one running optimizer, addressed as one. Picklable if its backend is.

    Args:
        backend: the shards' own.
        layout: the model's.
        options: the optimizer's.
        rewound: the epoch of the last rewind that the user knows of; None before the first look.
        poll_s: how long to sleep between two looks at something that is polled for.

    Attributes:
        reports: says what the shards do that keeps a call waiting.
        retry: makes requests again while shards are replaced.
    """

    def __init__(
        self,
        backend: Backend,
        layout: Layout,
        options: Options,
        *,
        rewound: int | None = None,
        poll_s: float = 0.02,
    ) -> None:
        self.backend = backend
        self.layout = layout
        self.options = options
        self.rewinds = RewindGuard(known=rewound)
        self.reports = ShardReports(backend.transport)
        self.retry = Retry(backend.transport, options.step_timeout_s, poll_s)
        self._seen_cuts: Sequence[Ranges] = ()
        self._ranges: list[Ranges] = []
        # whose groups' patterns never change, nor whether they have betas of their own
        self._config_at_first: NadamConfig | None = None
        self._direct = DirectSteps(self)

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(ShardGroup, rewound=self.rewinds.known)
        return make, (self.backend, self.layout, self.options)

    @property
    def ranges(self) -> list[Ranges]:
        """The ranges that each shard holds now; the same object as long as these are."""
        cuts = self.backend.transport.cuts
        if cuts is not self._seen_cuts:
            if list(cuts) != self._ranges:
                self._ranges = list(cuts)
            self._seen_cuts = cuts
        return self._ranges

    def describe(self) -> Description:
        """Return where shard 0 stands; never waits for a round."""
        description: Description = self.recovering(lambda: self.ask({0: Describe()})[0])
        return description

    def describe_all(self) -> list[Description]:
        """Return where every shard stands; never waits for a round, so they may differ."""
        answers = self.recovering(lambda: self.ask(self.for_all(Describe())))
        return [answers[index] for index in sorted(answers)]

    def load(self, params: Flat) -> None:
        """Give new shards their first parameters."""
        cuts = [cut_flat(params, ranges) for ranges in self.ranges]
        self._begin(
            {index: Load(epoch=1, params=cut) for index, cut in enumerate(cuts)},
            self.options.step_timeout_s,
        )
        self.backend.supervisor.started(initial=params, checkpoint=None)

    def restore(self, directory: Directory, manifest: Manifest) -> None:
        """Load a checkpoint into new shards: each reads its own ranges, all verify every byte."""
        raw, leftovers = manifest.to_bytes(), leftover_readers(manifest, len(self.ranges))
        messages = {
            index: Load(epoch=1, directory=directory.place, manifest=raw, leftovers=tuple(left))
            for index, left in enumerate(leftovers)
        }
        self._begin(messages, IO_TIMEOUT_S)
        checkpoint = CheckpointId(directory.place, manifest.save_id)
        self.backend.supervisor.started(initial=None, checkpoint=checkpoint)

    def _begin(self, loads: Mapping[int, Order], timeout_s: float) -> None:
        """Have new shards load, again if a call was lost: one that has loaded says so."""
        with said_if_long("loading the state", self.reports.busy):
            self.retry.poll(
                lambda: self.ask(loads, timeout_s=timeout_s),
                "the new shards did not all load their state",
                until_not=ShardUnavailable,
                timeout_s=timeout_s,
            )
        self.rewinds.acknowledge(1)

    @contextmanager
    def boundary(self, step: DirectStep | None = None) -> Iterator[Boundary]:
        """Pause all shards after the same round.

        Args:
            step: a step that the caller sends again; shards that lack it stay a round behind.
        """
        transport, token = self.backend.transport, self.backend.transport.new_token()

        def resume(messages: Mapping[int, Resume]) -> None:
            with suppress(DistNadamError):  # one that cannot be reached is not held either
                transport.post(messages)

        def may_lag(newest: Paused) -> bool:
            return step is not None and step.round == newest.round and step.is_counted(newest)

        ask = self.ask if step is None else partial(self.ask, who=DIRECT_CALL)
        with all_paused(ask, resume, token, len(self.ranges), may_lag=may_lag) as held:
            newest = max(held.values(), key=lambda answer: answer.round)
            rewound = max(answer.rewound for answer in held.values())
            self.rewinds.check(rewound, epoch=newest.epoch, round=newest.round)
            caught_up = () if may_lag(newest) else lagging(held)
            pending = {
                rank
                for index, answer in held.items()
                if index not in caught_up
                for rank in answer.pending
            }
            yield Boundary(
                token,
                replace(
                    newest,
                    pending=tuple(sorted(pending)),
                    revision=max(answer.revision for answer in held.values()),
                    awaits_norms=any(answer.awaits_norms for answer in held.values()),
                ),
            )

    def read(self, what: tuple[str, ...]) -> tuple[Clock, dict[str, Flat]]:
        """Return the clock and copies of the whole model's arrays at one round.

        Args:
            what: names of arrays, of `NadamConfig.state_arrays`.
        """
        return self._said_if_long(f"reading {', '.join(what)}", lambda: self._read(what))

    def _read(self, what: tuple[str, ...]) -> tuple[Clock, dict[str, Flat]]:
        whole = {name: empty_flat(self.layout.sizes) for name in what}
        with self.boundary() as at:
            for index, parts in self.ask(self.for_all(Read(at.token, what))).items():
                for name, flat in parts.items():
                    for space, (begin, end) in self.ranges[index].items():
                        whole[name][space][begin:end] = flat[space]
            return at.held.clock, whole

    def fill(self, state: Mapping[str, Flat], clock: Clock | None = None) -> None:
        """Replace whole arrays, and the clock if given, on every shard, between two rounds.

        Args:
            state: by name, of `NadamConfig.state_arrays`.
            clock: None keeps the present one.
        """

        def write() -> None:
            with self.boundary() as at:
                what = _describe_replacement("the state", at.held.round)
                begun = self.backend.supervisor.replacement_begun(what)
                writes = {
                    index: Write(
                        token=at.token,
                        state={name: cut_flat(flat, ranges) for name, flat in state.items()},
                        clock=clock,
                        epoch=at.held.epoch + 1,
                    )
                    for index, ranges in enumerate(self.ranges)
                }
                self.ask(writes)
                self.backend.supervisor.replacement_completed(begun)

        self._said_if_long(f"writing {', '.join(state)}", write)

    def set_config(self, values: Mapping[str, Any]) -> NadamConfig:
        """Change hyper-parameters from the next step on; return them all.

        Raises:
            ConfigError: a value cannot be, or cannot be changed; nothing was changed.
        """

        def write() -> NadamConfig:
            with self.boundary() as at:
                held = at.held
                config = changed_config(held.config, values)
                if held.awaits_norms and config.clips_by_norm != held.config.clips_by_norm:
                    self.ask(self.for_all(CatchUp(at.token, held.round + 1)))
                what = _describe_replacement("the configuration", held.round)
                begun = self.backend.supervisor.replacement_begun(what)
                self.ask(self.for_all(SetConfig(at.token, config, held.revision + 1)))
                self.backend.supervisor.replacement_completed(begun)
                return config

        return self._said_if_long(f"setting {', '.join(values)}", write)

    def overrides(self, lr: Rates | None, betas: Betas | BetasByGroup | None) -> bytes:
        """Return learning rates and betas of one step alone as a push has them.

        Raises:
            ConfigError: one is out of its range, or there is no such group.
        """
        patterns = None
        if isinstance(betas, Mapping) or isinstance(lr, Mapping):
            config = self._config_at_first = self._config_at_first or self.describe().config
            patterns = [group.pattern for group in config.groups]
            given = betas if isinstance(betas, Mapping) and config.has_momentum_schedule else {}
            for group in config.groups:
                if group.pattern in given and group.beta_1 is None:
                    raise ConfigError(
                        f"betas: group {group.pattern!r} shares the optimizer's product of the "
                        "momentum: give it a beta_1 of its own, in Group(beta_1=...)"
                    )
        return packed_overrides(lr, betas, patterns)

    def step(
        self,
        gradients: Any,
        *,
        found_inf: bool = False,
        lr: Rates | None = None,
        betas: Betas | BetasByGroup | None = None,
    ) -> RoundResult:
        """Apply one step from an already averaged gradient tree, or skip it for `found_inf`.

        Args:
            gradients: the tree.
            found_inf: whether they overflowed.
            lr: of this step alone, as `Worker.push` takes it.
            betas: of this step alone.

        Raises:
            ConfigError: as `overrides`.
            PushesPending: workers' pushes wait.
            Rewound: a shard died and all went back; nothing of this gradient is left.
        """
        settings = ORDINARY
        if found_inf or lr is not None or betas is not None:
            overrides = self.overrides(lr, betas)
            settings = RoundSettings(found_inf=bool(found_inf), overrides=overrides)
        step = DirectStep(settings=settings)
        return self.recovering(lambda: self._direct.apply(step, gradients))

    def reshard(self, shares: int | Sequence[int]) -> None:
        """Cut the state anew between two rounds, into shards of these shares, as `Layout.cuts`.

        Workers that wait for a round go on with the new shards.
        """
        cuts = self.layout.cuts(shares)

        def move() -> None:
            self.backend.supervisor.reshard(cuts)
            self.backend.transport.refresh()

        if cuts != self.ranges:
            self._said_if_long(
                f"reshard to {len(cuts)} shards, which start and load the state", move
            )

    def for_all(self, message: Message) -> dict[int, Message]:
        """Return the same message for every shard."""
        return dict.fromkeys(range(len(self.ranges)), message)

    def recovering(self, work: Callable[[], _T]) -> _T:
        """Return what `work` returns, calling it again from its beginning as `Retry` does.

        Raises:
            Rewound: the shards went back; this handle raises it once for each time.
        """
        try:
            with self.backend.shield:
                return self.retry.run(work)
        except Rewound as error:
            self.rewinds.acknowledge(error.epoch)
            raise

    def _said_if_long(self, what: str, work: Callable[[], _T]) -> _T:
        """Return what `recovering` returns; say what the shards do meanwhile if it takes long."""
        with said_if_long(what, self.reports.busy):
            return self.recovering(work)

    def go_back(self, reason: str, cause: DistNadamError | None = None) -> NoReturn:
        """Have all shards go back, since they stand at different rounds and cannot be made level.

        Raises:
            ShardLost: always, with that reason; awaiting a recovery then waits for the rewind.
        """
        self.backend.supervisor.report_cannot_complete()
        raise ShardLost(reason) from cause

    def ask(
        self,
        messages: Mapping[int, Message | Order],
        timeout_s: float | None = None,
        who: str | None = None,
    ) -> dict[int, Any]:
        """Send each shard its message and return the answers.

        Args:
            messages: by shard.
            timeout_s: seconds to wait; None for the options' step timeout.
            who: asks; a long wait is logged under this name, unless it is None.

        Raises:
            StepTimeout: not all answered in time.
        """
        if not messages:
            return {}
        timeout_s = self.options.step_timeout_s if timeout_s is None else timeout_s
        try:
            pending = self.backend.transport.post(messages)
            if who is None:
                return pending.result(timeout_s)
            try:
                return pending.result(min(waiting.REPORT_WAIT_S, timeout_s))
            except TimeoutError:
                return late_answers(pending, timeout_s, who, self.reports.busy)
        except TimeoutError as error:
            kind = type(next(iter(messages.values()))).__name__
            raise StepTimeout(
                f"shards {sorted(messages)} did not all answer {kind} in {timeout_s:g} s"
            ) from error


def _describe_replacement(what: str, round: int) -> str:
    """Return the sentence for what was replaced after a round."""
    return f"{what} was replaced after round {round}"
