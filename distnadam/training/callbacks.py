"""The callbacks of `fit`: the interface, and a list of them.

They observe a run, may stop it, and in `on_begin` and `on_evaluate` may set its learning rate and
other hyper-parameters. One that raises ends it. Ready-made ones are in `distnadam.callbacks`.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from typing_extensions import override

from distnadam.checkpoint.contents import packed_data
from distnadam.client.status import Status
from distnadam.errors import ConfigError, RayLost, Rewound, ShardLost, TrainingError, Unrecoverable
from distnadam.shield import shield
from distnadam.training.run_handle import RunHandle
from distnadam.training.steps import StepRecord

_KEY, _STOPS = "callbacks", "stops"
"""What checkpoints have under these names: states, and decisions to stop."""
_OF_THE_OPTIMIZER = (RayLost, Rewound, ShardLost, Unrecoverable)
"""Errors that a callback passes on from the optimizer that it asked."""


class Callback:
    """Receives the events of a run; each method does nothing until it is overridden.

    A callback runs in the process and thread that called `fit`. `step` counts the steps done, so it
    is 1 after the first.

    Attributes:
        run: the run, from before its first event: its optimizer, and `run.stop(reason)`.

    >>> class StopAt(Callback):
    ...     def __init__(self, loss):
    ...         self._loss = loss
    ...     def on_step(self, step, loss):
    ...         if loss < self._loss:
    ...             self.run.stop(f"the loss fell below {self._loss}")
    >>> stop = StopAt(0.1)  # for fit(..., callbacks=[stop])
    """

    run: RunHandle

    def state(self) -> dict[str, Any]:
        """Return what it has to know again to decide in a resumed run as it would have in this one,
        as data that a checkpoint can hold (`DistNadam.save` says which); {}: nothing.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` has returned: when a run resumes, before `on_begin`, that of the run
        before; when it goes back to its beginning, that of the beginning.
        """

    def stops_again(self) -> bool:
        """Return whether it stops a run that resumes from where it stopped it; asked after
        `load_state`. False where it is set otherwise now, and would not have.
        """
        return True

    def on_begin(self, step: int, steps: int) -> None:
        """Training begins, or begins again, after `step` of `steps` steps."""

    def on_records(self, records: Sequence[StepRecord]) -> None:
        """A burst of steps is done; then come `on_record` and `on_step` of each."""

    def _hears(self, event: str) -> bool:
        """Whether an event of single steps does anything here; if not, it is not called."""
        return getattr(getattr(self, event), "__func__", None) is not getattr(Callback, event)

    def on_step(self, step: int, loss: float) -> None:
        """A step is done; `loss` is the mean over the ranks. Calls come in bursts of steps.

        It is NaN if no rank lived to report it.
        """

    def on_record(self, record: StepRecord) -> None:
        """As `on_step`, just before it, with all that is known of the step."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """The task has evaluated the parameters after `step` steps."""

    def on_save(self, step: int, path: Path | str) -> None:
        """A checkpoint is complete; `path` is a string if it is a URL."""

    def on_recovery(self, step: int, who: str, text: str) -> None:
        """Something died or failed at `step`, and the run goes on: `who`, such as "worker 1".

        `on_message` says the same to the user, but for shards whose standby took over.
        """

    def on_status(self, status: Status, workers: Mapping[int, str]) -> None:
        """Where all shards stand, every second or more; `workers` are the hosts of ranks."""

    def on_message(self, text: str) -> None:
        """Something happened that the user should know, such as a recovery."""

    def on_phase(self, text: str) -> None:
        """Something begins that takes seconds before the first step, such as starting Ray."""

    def on_end(self) -> None:
        """Training ends, by success, error or Ctrl-C."""


class CallbackList(Callback):
    """Passes each event to several callbacks, in order, whatever one of them raises.

    One that raised gets no further events; the run ends after the running steps and raises
    `failure`.

    Args:
        callbacks: what to call.
        run: what they see of the run.

    Attributes:
        failure: the first error that a callback raised, with the callback's name; None if none did.
        interrupted: whether Ctrl-C came in a callback; a second one raises.
    """

    def __init__(self, callbacks: Sequence[Callback], run: RunHandle | None = None) -> None:
        self._callbacks = list(callbacks)
        self._knows_run = run is not None
        if run is not None:
            self.run = run
            for callback in callbacks:
                callback.run = run
        self._named = dict(_named(callbacks))
        self._names = {id(callback): name for name, callback in self._named.items()}
        self._initial = {}
        for name, state in self._states().items():  # before its first run, which it may have had
            first = vars(self._named[name]).setdefault("_state_at_first", deepcopy(state))
            self._initial[name] = first
        self.failure: TrainingError | None = None
        self.interrupted = False

    def data(self) -> dict[str, Any]:
        """Return what a checkpoint holds of them. One that does not return its state has none
        there, and counts as one that raised.
        """
        states = {}
        for name, callback in self._named.items():
            try:
                if state := _state_of(name, callback):
                    states[name] = state
            except TrainingError as error:
                error.add_note(
                    "What is saved has no state of it: a run that resumes from there has it begin "
                    "as at first."
                )
                self._drop(callback, error)
        stops = {name: why for name, why in self.run.stops.items() if name in self._named}
        return ({_KEY: states} if states else {}) | ({_STOPS: stops} if stops else {})

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Have each take its state in a checkpoint's data; the one at first if there is none.

        One that had decided to stop there has decided so; a decision after it is to be made again.

        Raises:
            TrainingError: one does not take what was saved under its name.
        """
        states, decided = (saved or {}).get(_KEY, {}), (saved or {}).get(_STOPS, {})
        stops: dict[str | None, str] = {}
        for name, callback in self._named.items():
            state = states.get(name, self._initial[name])
            try:
                callback.load_state(deepcopy(state))
                if name in decided and callback.stops_again():
                    stops[name] = decided[name]
            except Exception as error:
                raise TrainingError(
                    f"callback {name}.load_state: it raised {type(error).__name__}: {error}; the "
                    f"checkpoint has {state!r} for it: resume with the callbacks that it was saved "
                    "with, or begin anew"
                ) from error
        self.run.stops = stops

    def _states(self) -> dict[str, dict[str, Any]]:
        return {name: _state_of(name, callback) for name, callback in self._named.items()}

    @property
    def ends_run(self) -> bool:
        """Whether a callback raised, was interrupted, or stopped the run."""
        return self.failure is not None or self.interrupted or self.run.stopped is not None

    def outcome(self, *, terminated: bool, interrupted: bool) -> str:
        """Return how a run that ended in order did so, as `History.outcome` says it."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        if terminated:
            return "terminated"
        if interrupted or self.interrupted:
            return "interrupted"
        return "finished" if self.run.stopped is None else f"stopped: {self.run.stopped}"

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self._pass_on("on_begin", step, steps)

    def report(self, records: Sequence[StepRecord]) -> None:
        """Pass on a burst of steps: whole, then each to those that override the events of one."""
        with shield:  # no row is lost to a Ctrl-C
            self.on_records(records)
        events = [each for each in ("on_record", "on_step") if self._hears(each)]
        for record in records if events else records[-1:]:
            self.run.step = record.step
            if "on_record" in events:
                with shield:
                    self.on_record(record)
            if "on_step" in events:
                self.on_step(record.step, record.loss)

    @override
    def _hears(self, event: str) -> bool:
        return any(callback._hears(event) for callback in self._callbacks)

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        self._pass_on("on_records", records)

    @override
    def on_record(self, record: StepRecord) -> None:
        self._pass_on("on_record", record)

    @override
    def on_step(self, step: int, loss: float) -> None:
        self._pass_on("on_step", step, loss)

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pass_on("on_evaluate", step, metrics)

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        self._pass_on("on_save", step, path)

    @override
    def on_recovery(self, step: int, who: str, text: str) -> None:
        self._pass_on("on_recovery", step, who, text)

    @override
    def on_status(self, status: Status, workers: Mapping[int, str]) -> None:
        self._pass_on("on_status", status, workers)

    @override
    def on_message(self, text: str) -> None:
        self._pass_on("on_message", text)

    @override
    def on_phase(self, text: str) -> None:
        self._pass_on("on_phase", text)

    @override
    def on_end(self) -> None:
        self._pass_on("on_end")

    def _pass_on(self, event: str, *args: Any) -> None:
        for callback in tuple(self._callbacks):
            try:
                if self._knows_run:
                    self.run.calls = self._names[id(callback)]
                getattr(callback, event)(*args)
            except _OF_THE_OPTIMIZER:
                raise
            except KeyboardInterrupt:  # the others get the event all the same
                if self.interrupted:
                    raise
                self.interrupted = True
            except Exception as error:
                self._drop(callback, _failure(callback, event, args, error))

    def _drop(self, callback: Callback, failure: TrainingError) -> None:
        """Have a callback get no further events, and the run end with its failure."""
        self._callbacks = [each for each in self._callbacks if each is not callback]
        if self.failure is None:
            self.failure = failure


def _named(callbacks: Sequence[Callback]) -> Iterator[tuple[str, Callback]]:
    """Yield callbacks with names for their states: their class's, numbered where it recurs."""
    count: Counter[str] = Counter()
    for callback in callbacks:
        name = type(callback).__name__
        count[name] += 1
        yield (name if count[name] == 1 else f"{name} {count[name]}"), callback


def _state_of(name: str, callback: Callback) -> dict[str, Any]:
    """Return a callback's state; raise TrainingError if it has none that a checkpoint can hold."""
    try:
        state = callback.state()
    except _OF_THE_OPTIMIZER:
        raise
    except Exception as error:
        raise _failure(callback, "state", (), error) from error
    if not isinstance(state, dict):
        raise TrainingError(f"callback {name}.state: expected a dict, got {state!r}")
    try:
        packed_data(state)
    except ConfigError as error:
        raise TrainingError(f"callback {name}.state: {error}") from error
    return state


def _failure(
    callback: Callback, event: str, args: tuple[Any, ...], error: Exception
) -> TrainingError:
    """Return the error that a callback's ends the run with."""
    if isinstance(error, TrainingError) and type(callback).__module__.startswith("distnadam."):
        return error  # of ours, which say what they could not do
    at = f", step {args[0]}" if args and isinstance(args[0], int) else ""
    name = f"callback {type(callback).__name__}.{event}{at}"
    failure = TrainingError(f"{name}: it raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    failure.add_note("".join(traceback.format_exception(error)))
    return failure
