"""One run of `fit`: from its first step, or its newest checkpoint, to its last.

Workers run segments of rounds that end together, so that nothing is pending between two segments:
there the driver evaluates, saves, shows progress and reacts to Ctrl-C. Ranks that die are replaced
by `rank_runner`, shards by the optimizer's supervisor; if all shards are lost, the run starts again
from its newest checkpoint.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from distnadam.backends.base import WorkerGroup
from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.run_lock import RunLock
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.errors import CheckpointError, Rewound, ShardLost, TrainingError, Unrecoverable
from distnadam.optimizer import DistNadam
from distnadam.schedules import rate_to_dict
from distnadam.tensors.layout import Layout
from distnadam.training.callbacks import Callback
from distnadam.training.checkpoint_manager import CheckpointManager, Plan
from distnadam.training.history import History
from distnadam.training.plot import plot_loss
from distnadam.training.rank_loop import RankLoop, task_errors
from distnadam.training.rank_runner import RankRunner, RetryBudget
from distnadam.training.task import Task
from distnadam.training.termination import STATUS, Termination

SEGMENT_S = 0.3
"""The duration in seconds that segments are lengthened or shortened to."""


@dataclass(kw_only=True)
class TrainingRun:
    """Everything that one call of `fit` trains with.

    Args:
        task: the user's task.
        label: the task's name, which checkpoints record.
        seed: given to `Task.init`.
        root: the local directory for metrics and plot.
        lock: held on the directory of checkpoints.
        topology: numbers of workers, shards and replicas, and the backend, as `DistNadam` takes
            them.
        plan: steps, and when to save and evaluate.
        callbacks: receives all events.
        history: the record to fill in.
    """

    task: Task
    label: str
    seed: int
    root: Path
    lock: RunLock
    topology: dict[str, Any]
    plan: Plan
    callbacks: Callback
    history: History
    termination: Termination
    _interrupted: bool = field(default=False, init=False)
    _reached: int = field(default=0, init=False)
    _retries: RetryBudget = field(default_factory=RetryBudget, init=False)

    def run(self, template: DistNadam | None) -> None:
        """Train to the end, with the hyper-parameters and options of `template`.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint has been saved.
            SystemExit: SIGTERM came; a checkpoint has been saved.
            TrainingError: the task failed, or recoveries brought no new step.
        """
        params = self.task.init(self.seed)
        began = time.monotonic()
        try:
            while not self._attempt(template, params):
                self.plan = replace(self.plan, resume="auto")
        finally:
            self.history.seconds = time.monotonic() - began
            self.history.recoveries = self._retries.total
            self.callbacks.on_end()
        if not self._interrupted:
            self._plot()
        if self.termination.requested:
            raise SystemExit(STATUS)
        if self._interrupted:
            raise KeyboardInterrupt

    def _attempt(self, template: DistNadam | None, params: Any) -> bool:
        """Train to the end; return False if all shards were lost, so that the caller resumes."""
        try:
            with self._make_optimizer(template, params) as optimizer:
                self._train_with_workers(optimizer)
        except (ShardLost, Unrecoverable) as error:
            self._retries.count(self._reached, error)
            self.callbacks.on_message(f"{error}; beginning again from the newest checkpoint")
            return False
        return True

    def _train_with_workers(self, optimizer: DistNadam) -> None:
        """Start the workers, train, and end them again; save first if Ctrl-C stopped the run."""
        group: WorkerGroup | None = None
        num_workers = self.topology["num_workers"]
        checkpoints = CheckpointManager(
            optimizer.saves,
            self.lock,
            self.plan.keep,
            {"task": self.label, "seed": self.seed, "num_workers": num_workers},
            self.callbacks.on_save,
            self.callbacks.on_message,
        )
        try:
            if self.plan.save_every is not None:
                optimizer.reserve()
            self.termination.arm()  # Ray may have taken the signal since
            first = optimizer.round
            self.callbacks.on_begin(first, self.plan.steps)
            group = optimizer.team(
                partial(_rank_loop, task=self.task, optimizer=optimizer, world_size=num_workers)
            )
            ranks = RankRunner(
                group,
                num_workers,
                optimizer=optimizer,
                retries=self._retries,
                on_message=self.callbacks.on_message,
            )
            try:
                self._train(optimizer, ranks, checkpoints, first)
            except KeyboardInterrupt:
                if self._interrupted:
                    raise
                self._interrupted = True  # it came between two segments, where nothing is pending
                checkpoints.save(optimizer, optimizer.round, wait=True)
                self.callbacks.on_message(f"saved step {optimizer.round} of {self.plan.steps}")
        finally:
            checkpoints.give_up()
            optimizer.close()  # first, as it releases workers that wait for one that is gone
            if group is not None:
                group.close()

    def _train(
        self, optimizer: DistNadam, ranks: RankRunner, checkpoints: CheckpointManager, step: int
    ) -> None:
        """Run segments of about `SEGMENT_S` from `step` to the plan's end, or until Ctrl-C."""
        plan, length = self.plan, 1
        if step >= plan.steps:
            self.callbacks.on_message(f"nothing to do: {step} of {plan.steps} steps are done")
            self._evaluate(optimizer, step)
        while step < plan.steps and not self._interrupted:
            if self.termination.requested:
                self._interrupted = True
                self._at_boundary(optimizer, ranks, checkpoints, step)
                return
            end = min(step + length, plan.boundary_after(step))
            began = time.monotonic()
            losses = self._run_segment(ranks, end)
            steps_per_s = (end - step) / max(time.monotonic() - began, 1e-6)
            length = max(1, min(2 * length, int(SEGMENT_S * steps_per_s)))
            for done, loss in losses.items():
                if done >= step:  # the others were reported before the shards went back
                    self.callbacks.on_step(done + 1, loss)
            step = self._reached = end
            self._at_boundary(optimizer, ranks, checkpoints, step)

    def _at_boundary(
        self, optimizer: DistNadam, ranks: RankRunner, checkpoints: CheckpointManager, step: int
    ) -> None:
        """Evaluate and save if due; if the shards go back meanwhile, train up to here again."""
        due: list[Callable[[DistNadam, int], None]] = []
        if self.plan.due(self.plan.evaluate_every, step) and not self._interrupted:
            due.append(self._evaluate)
        if self.plan.due(self.plan.save_every, step) or self._interrupted:
            wait = step == self.plan.steps or self._interrupted
            due.append(partial(checkpoints.save, wait=wait))
        while due:
            try:
                due[0](optimizer, step)
                due.pop(0)
            except Rewound:
                self._run_segment(ranks, step)
        checkpoints.poll()
        if self._interrupted:
            self.callbacks.on_message(f"saved step {step} of {self.plan.steps}")

    def _run_segment(self, ranks: RankRunner, end: int) -> dict[int, float]:
        """Train until round `end` and return the losses by step.

        The first Ctrl-C lets the segment end and stops the run after it; a second one raises.
        """
        ranks.begin(end)
        try:
            return ranks.finish()
        except KeyboardInterrupt:
            self._interrupted = True
            self.callbacks.on_message(
                "stopping after the running steps, then saving (Ctrl-C again: stop now, without "
                "saving)"
            )
            return ranks.finish()

    def _evaluate(self, optimizer: DistNadam, step: int) -> None:
        params = optimizer.get_params()
        with task_errors(f"evaluate after step {step}"):
            metrics = {name: float(value) for name, value in self.task.evaluate(params).items()}
        self.callbacks.on_evaluate(step, metrics)

    def _make_optimizer(self, template: DistNadam | None, params: Any) -> DistNadam:
        """Return a built optimizer: restored if there is a checkpoint to resume from, else new."""
        config = (template or DistNadam()).get_config() | self.topology
        # raises, before the first step and not at the first save, for a function that no
        # checkpoint can hold
        rate_to_dict(config["lr"])
        found = self._find_checkpoint()
        if found is None:
            return DistNadam.from_config(config).build(params)
        directory, manifest = found
        self._check_same_run(manifest, Layout.of(params))
        if template is not None:
            self._report_kept_settings(manifest.config, config)
        self.history.resumed_from = (
            directory.path if isinstance(directory, LocalDirectory) else str(directory)
        )
        return DistNadam.restore(
            directory,
            **self.topology,
            name=config["name"],
            options=DistNadam.from_config(config).options,
        )

    def _find_checkpoint(self) -> tuple[Directory, Manifest] | None:
        """Return the checkpoint to resume from, None for a new run, as `resume` allows."""
        directory, resume = self.lock.directory, self.plan.resume
        existing = store.step_directories(directory)
        if not existing:
            if resume == "must":
                raise CheckpointError(f"{directory}: holds no checkpoint to resume from")
            return None
        if resume == "never":
            raise CheckpointError(
                f"{directory}: holds checkpoints, the newest {existing[-1].name}; resume it, or "
                "choose another"
            )
        path, manifest, passed_over = store.find(directory)
        for sentence in passed_over:
            self.callbacks.on_message(f"passed over: {sentence}")
        self.callbacks.on_message(f"resuming from {path}")
        return path, manifest

    def _check_same_run(self, manifest: Manifest, layout: Layout) -> None:
        """Raise CheckpointError if a checkpoint is of another task, seed or model."""
        directory, saved = self.lock.directory, manifest.user_data
        for key, ours in (("task", self.label), ("seed", self.seed)):
            if saved.get(key) != ours:
                raise CheckpointError(
                    f"{directory}: its checkpoint is of {key} {saved.get(key)!r}, this run's is "
                    f"{ours!r}; choose another directory"
                )
        if Layout.from_dict(manifest.layout) != layout:
            raise CheckpointError(
                f"{directory}: its checkpoint has other tensors than the task's; choose another "
                "directory"
            )
        if saved.get("num_workers") != self.topology["num_workers"]:
            self.callbacks.on_message(
                f"the run had {saved.get('num_workers')} workers and goes on with "
                f"{self.topology['num_workers']}: batches are dealt differently from here on, so "
                "it will not end with the bits that it would have"
            )

    def _report_kept_settings(self, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        kept = [
            f"{key}={saved[key]!r} (not {asked.get(key)!r})"
            for key in saved
            if saved[key] != asked.get(key)
        ]
        if kept:
            self.callbacks.on_message(
                f"the run goes on with its checkpoint's {', '.join(kept)}; set optimizer.lr, or "
                "start another run"
            )

    def _plot(self) -> None:
        try:
            self.history.plot_path = plot_loss(self.history.metrics_path, self.root / "loss.png")
        except (TrainingError, OSError, MemoryError) as error:  # of a run that is done
            self.callbacks.on_message(f"no plot: {error}")


def _rank_loop(rank: int, *, task: Task, optimizer: DistNadam, world_size: int) -> RankLoop:
    return RankLoop(task, optimizer.worker(rank), world_size)
