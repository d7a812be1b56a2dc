"""One run of `fit`: from its first step, or its newest checkpoint, to its last.

Workers run segments of rounds that end together, so that nothing is pending between two segments:
there the driver evaluates, saves, shows progress and reacts to Ctrl-C, to SIGTERM and to a callback
that raised. Ranks that die are replaced by `rank_runner`, shards by the optimizer's supervisor; if
all shards are lost, or a task's own state, the run starts again from its newest checkpoint.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from distnadam.backends.base import WorkerGroup
from distnadam.backends.factory import start_in_words
from distnadam.checkpoint.run_lock import RunLock
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.config import Options
from distnadam.errors import (
    DistNadamError,
    RayLost,
    Rewound,
    ShardLost,
    TrainingError,
    Unrecoverable,
)
from distnadam.optimizer import DistNadam
from distnadam.training.callbacks import CallbackList
from distnadam.training.checkpoint_manager import CheckpointManager
from distnadam.training.history import History
from distnadam.training.metrics_file import evaluation_at, say_if_anew
from distnadam.training.plot import plot_loss
from distnadam.training.rank_loop import start_ranks
from distnadam.training.rank_runner import RankRunner, RetryBudget
from distnadam.training.resuming import (
    Found,
    Request,
    Resumed,
    find_checkpoint,
    settings_of_resumed,
    with_what_is_saved,
)
from distnadam.training.run_plan import RunPlan
from distnadam.training.step_reports import SeenSteps, report_incomplete, report_steps
from distnadam.training.task import Task
from distnadam.training.task_checks import metrics_of
from distnadam.training.task_code import TaskCode
from distnadam.training.task_errors import task_errors
from distnadam.training.termination import STATUS, Termination
from distnadam.training.watch import Watch

SEGMENT_S = 0.3
"""The duration in seconds that segments are lengthened or shortened to."""
_NOT_NOW = (
    "optimizer.lr cannot be set here, and set_config not called, as steps run behind callbacks and "
    "the step from which it would hold depends on the time: do it in on_begin or on_evaluate, or "
    "give a schedule"
)


@dataclass(kw_only=True)
class TrainingRun:
    """Everything that one call of `fit` trains with.

    Args:
        task: the user's task, which evaluates.
        as_begun: a copy of it as `init` left it, of which workers get copies: `evaluate` may change
            the task, and a worker that is started later gets what the first got.
        params: what `init` returned.
        request: what is asked for.
        template: the optimizer that was given, if any; its settings are the run's meanwhile.
        root: the local directory for metrics and plot.
        lock: held on the directory of checkpoints.
        plan: steps, and when to save and evaluate.
        callbacks: receives all events.
        history: the record to fill in.
        termination: notes a SIGTERM.
    """

    task: Task
    as_begun: Task
    params: Any
    request: Request
    template: DistNadam | None
    root: Path
    lock: RunLock
    plan: RunPlan
    callbacks: CallbackList
    history: History
    termination: Termination
    _code: TaskCode = field(init=False)
    _interrupted: bool = field(default=False, init=False)
    _reached: int = field(default=0, init=False)
    _shard_recoveries: int = field(default=0, init=False)
    _retries: RetryBudget = field(default_factory=RetryBudget, init=False)

    def __post_init__(self) -> None:
        self._code = TaskCode(self.task)

    def run(self) -> None:
        """Train to the end.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint has been saved.
            SystemExit: SIGTERM came; a checkpoint has been saved.
            TrainingError: the task failed, or recoveries brought no new step; or a callback raised,
                and a checkpoint has been saved.
            RayLost: Ray itself died; the message says what is saved.
        """
        began = time.monotonic()
        self._follow(None)
        try:
            while not self._attempt():
                self.request = replace(self.request, resume="auto")
            self.history.outcome = self.callbacks.outcome(
                terminated=self.termination.requested, interrupted=self._interrupted
            )
        except BaseException as error:
            self.history.outcome = f"failed: {type(error).__name__}: {error}"
            if isinstance(error, RayLost):
                raise with_what_is_saved(error, self.lock.directory) from error
            raise
        finally:
            self.history.seconds = time.monotonic() - began
            self.history.recoveries = self._retries.total + self._shard_recoveries
            self.callbacks.on_end()
            self._follow(None, None)
        if not self._interrupted:
            self._plot()
        if self.callbacks.failure is not None:
            raise self.callbacks.failure
        if self.termination.requested:
            raise SystemExit(STATUS)
        if self._interrupted or self.callbacks.interrupted:
            raise KeyboardInterrupt

    def _attempt(self) -> bool:
        """Train to the end; return False if all shards were lost, so that the caller resumes."""
        found = find_checkpoint(self.lock.directory, self.request, self.callbacks.on_message)
        recoveries, state = self._retries.total, self.request.state
        saved = None if found is None else found[1].user_data
        with task_errors("load_state"):
            state.begin(saved, self.task, self.as_begun)
        self.callbacks.begin(saved)
        if found is not None:
            directory = found[0]
            self.history.resumed_from = (
                directory.path if isinstance(directory, LocalDirectory) else directory.place
            )
            if found[1].round >= self.plan.steps or self.callbacks.run.stopped is not None:
                self._end_at_once(found)
                return True
        elif not self._retries.total:
            say_if_anew(self.history.metrics_path, self.callbacks.on_message)
        try:
            with self._make_optimizer(found) as optimizer:
                self._follow(optimizer)
                self._train_with_workers(optimizer)
        except (ShardLost, Unrecoverable, Rewound) as error:
            if not (state.is_kept and self._retries.total > recoveries):  # a rank's is counted
                self._retries.count(self._reached, error)
            self._recovered("run", f"{error}; beginning again from the newest checkpoint")
            return False
        finally:
            self._follow(None)
        return True

    def _end_at_once(self, found: Found) -> None:
        """Report that all is done already; evaluate here if that was not done."""
        directory, manifest = found
        step, stopped = manifest.round, self.callbacks.run.stopped
        why = "" if stopped is None else f": {stopped} (without that callback it goes on)"
        self.callbacks.on_message(f"nothing to do: {step} of {self.plan.steps} steps are done{why}")
        metrics = evaluation_at(self.history.metrics_path, step)
        how: dict[str, Any] = {"num_shards": 1, "num_workers": 1, "replicas": 0}
        with DistNadam.restore(directory, **how, backend="local", options=Options()) as optimizer:
            self.callbacks.run.follow(optimizer)
            self.callbacks.on_begin(step, self.plan.steps)
            if metrics:
                self.history.evaluations.append((step, metrics))
            elif stopped is None:
                self.callbacks.on_evaluate(step, self._metrics(optimizer, step))
            self.callbacks.run.follow(None)

    def _train_with_workers(self, optimizer: DistNadam) -> None:
        """Start the workers, train, and end them again; save first if Ctrl-C stopped the run."""
        group: WorkerGroup | None = None
        callbacks, num_workers = self.callbacks, self.request.settings.topology.num_workers
        checkpoints = CheckpointManager(
            optimizer.saves, self.lock, self.plan.keep, callbacks.on_save, callbacks.on_message
        )
        try:
            if self.plan.save_every is not None:
                optimizer.reserve()
            self.termination.arm()  # Ray may have taken the signal since
            first = optimizer.round
            callbacks.run.follow(optimizer, checkpoints.finish)
            with self._settings_may_change(optimizer):
                callbacks.on_begin(first, self.plan.steps)
            if optimizer.backend_name != "local":
                callbacks.on_phase(f"starting {num_workers} workers")
            group = start_ranks(
                optimizer,
                self.as_begun,
                self._code,
                world_size=num_workers,
                first=first,
                accumulate=self.plan.accumulate,
            )
            ranks = RankRunner(
                group,
                num_workers,
                optimizer=optimizer,
                retries=self._retries,
                on_recovery=self._recovered,
                stateful=self.request.state.is_kept,
            )
            watch = Watch(optimizer.shards, group, callbacks)
            try:
                self._train(optimizer, ranks, checkpoints, watch, first)
            except KeyboardInterrupt:
                if self._interrupted:
                    raise
                self._interrupted = True  # it came between two segments, where nothing is pending
                self._save_before_the_end(optimizer, ranks, checkpoints, optimizer.round)
        finally:
            checkpoints.give_up()
            with suppress(DistNadamError):  # the supervisor may be what died
                self._shard_recoveries += optimizer.shards.backend.supervisor.shard_recoveries()
            optimizer.close()  # first, as it releases workers that wait for one that is gone
            if group is not None:
                group.close()

    def _train(
        self,
        optimizer: DistNadam,
        ranks: RankRunner,
        checkpoints: CheckpointManager,
        watch: Watch,
        step: int,
    ) -> None:
        """Run segments of about `SEGMENT_S` from `step` to the plan's end, or until Ctrl-C."""
        plan, length = self.plan, 1
        self._run_segment(ranks, step)  # of no step: it is over once all workers are there
        skipped = step > 0 and plan.due(plan.evaluate_every, step)
        if skipped and not evaluation_at(self.history.metrics_path, step):
            self._at_boundary(ranks, checkpoints, step, [partial(self._evaluate, optimizer)])
        watch.look(step)
        while step < plan.steps and not self._ends_early:
            end = min(step + length, plan.boundary_after(step))
            began, recoveries = time.monotonic(), self._retries.total
            seen = self._run_segment(ranks, end)
            seconds = max(time.monotonic() - began, 1e-6)
            watch.look(end)
            report_steps(
                self.callbacks, self.history, seen, range(step, end), seconds, watch.apply_s
            )
            if self._retries.total > recoveries:
                num_workers = self.request.settings.topology.num_workers
                report_incomplete(self.callbacks, seen, range(step, end), num_workers)
            length = max(1, min(2 * length, int(SEGMENT_S * (end - step) / seconds)))
            step = self._reached = end
            due: list[Callable[[int], None]] = []
            if plan.due(plan.evaluate_every, step) and not self._interrupted:
                due.append(partial(self._evaluate, optimizer))
            must = bool(moving := ranks.to_leave()) and self.request.state.is_kept
            if must or (plan.due(plan.save_every, step) and not self._interrupted):
                wait = must or step == plan.steps
                due.append(partial(self._save, checkpoints, optimizer, wait=wait))
            self._at_boundary(ranks, checkpoints, step, due)
            if step < plan.steps and not self._ends_early:
                ranks.move(moving)
        if step < plan.steps or self._interrupted:
            self._save_before_the_end(optimizer, ranks, checkpoints, step)

    def _save_before_the_end(
        self, optimizer: DistNadam, ranks: RankRunner, checkpoints: CheckpointManager, step: int
    ) -> None:
        """Save a run that ends before its last step, and say so."""
        save = partial(self._save, checkpoints, optimizer, wait=True)
        self._at_boundary(ranks, checkpoints, step, [save])
        stopped = self.callbacks.run.stopped
        why = "" if stopped is None else f": {stopped}"
        self.callbacks.on_message(f"saved step {step} of {self.plan.steps}{why}")

    @property
    def _ends_early(self) -> bool:
        """Whether Ctrl-C, SIGTERM or a callback ends the run after the running steps."""
        return self._interrupted or self.termination.requested or self.callbacks.ends_run

    def _recovered(self, who: str, text: str) -> None:
        self.callbacks.on_recovery(self._reached, who, text)
        self.callbacks.on_message(text)

    def _at_boundary(
        self,
        ranks: RankRunner,
        checkpoints: CheckpointManager,
        step: int,
        due: list[Callable[[int], None]],
    ) -> None:
        """Do what is due; if the shards go back meanwhile, train up to here again."""
        if due and self.request.state.is_kept:
            due.insert(0, partial(self._take_state, ranks))
        while due:
            try:
                due[0](step)
                due.pop(0)
            except Rewound:
                self._run_segment(ranks, step)
        checkpoints.poll()

    def _run_segment(self, ranks: RankRunner, end: int) -> SeenSteps:
        """Train until round `end` and return what each rank saw of each step.

        The first Ctrl-C lets the segment end and stops the run after it; a second one raises.
        """
        begun = ranks.segments
        try:
            ranks.begin(end)
            return ranks.finish()
        except KeyboardInterrupt:
            if ranks.segments == begun:
                raise  # nothing is pending
            self._interrupted = True
            self.callbacks.on_message(
                "stopping after the running steps, then saving (Ctrl-C again: stop now, without "
                "saving)"
            )
            return ranks.finish()

    def _take_state(self, ranks: RankRunner, step: int) -> None:
        state = ranks.state()
        with task_errors(f"load_state after step {step}"):
            self.request.state.take(state, self.task)

    def _save(
        self, checkpoints: CheckpointManager, optimizer: DistNadam, step: int, *, wait: bool
    ) -> None:
        data = self.request.state.data | self.callbacks.data()
        checkpoints.save(optimizer, step, data=data, wait=wait)

    def _evaluate(self, optimizer: DistNadam, step: int) -> None:
        metrics = self._metrics(optimizer, step)
        with self._settings_may_change(optimizer):
            self.callbacks.on_evaluate(step, metrics)

    def _metrics(self, optimizer: DistNadam, step: int) -> dict[str, float]:
        params = optimizer.get_params()
        where = f"evaluate after step {step}"
        with task_errors(where):
            return metrics_of(self.task.evaluate(params), where)

    def _make_optimizer(self, found: Found | None) -> DistNadam:
        """Return a built optimizer: with a checkpoint's state if one was found, else new."""
        request = self.request
        resumed = Resumed(settings=request.settings.with_run(request.run), rate=None)
        if found is not None:
            resumed = settings_of_resumed(found, request, self.callbacks.on_message)
        topology = request.settings.topology
        starting = start_in_words(topology.backend, several=topology.several)
        if starting is not None:
            self.callbacks.on_phase(f"{starting} {topology.num_shards} shards")
        optimizer = DistNadam.of(resumed.settings, found)
        if found is None:
            optimizer.build(self.params)
        if resumed.rate is not None:
            optimizer.lr = resumed.rate
        return optimizer

    def _follow(self, optimizer: DistNadam | None, refusal: str | None = _NOT_NOW) -> None:
        """Have the optimizer that was given show the run's settings, and change them or not; and
        callbacks see the run's.
        """
        if optimizer is None:
            self.callbacks.run.follow(None)
        else:
            optimizer.follow(None, refusal)
        if self.template is not None:
            self.template.follow(optimizer, refusal)

    @contextmanager
    def _settings_may_change(self, optimizer: DistNadam) -> Iterator[None]:
        """Let callbacks set hyper-parameters: nothing is pending, the step is a certain one."""
        self._follow(optimizer, None)
        try:
            yield
        finally:
            self._follow(optimizer)

    def _plot(self) -> None:
        try:
            self.history.plot_path = plot_loss(self.history.metrics_path, self.root / "loss.png")
        except (TrainingError, OSError, MemoryError) as error:  # of a run that is done
            self.callbacks.on_message(f"no plot: {error}")
