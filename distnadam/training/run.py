"""One run of `fit`, from its first segment, or its newest checkpoint, to its last.

Workers run segments of rounds that end together, so that between two segments nothing is pending:
there the driver saves, evaluates, shows progress and listens to Ctrl-C.
"""

import time
from collections.abc import Mapping
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

SEGMENT_S = 0.3
"""About how long workers run between two looks of the driver, in seconds."""


@dataclass
class _Run:
    task: Task
    label: str
    seed: int
    root: Path
    claim: RunLock
    topology: dict[str, Any]
    plan: Plan
    callbacks: list[Callback]
    history: History
    interrupted: bool = field(default=False, init=False)
    reached: int = field(default=0, init=False)
    recoveries: RetryBudget = field(default_factory=RetryBudget, init=False)

    def run(self, template: DistNadam | None) -> None:
        params = self.task.init(self.seed)
        began = time.monotonic()
        try:
            while not self._attempt(template, params):
                self.plan = replace(self.plan, resume="auto")
        finally:
            self.history.seconds = time.monotonic() - began
            self.history.recoveries = self.recoveries.total
            self._tell("on_end")
        if self.interrupted:
            raise KeyboardInterrupt
        self._plot()

    def _attempt(self, template: DistNadam | None, params: Any) -> bool:
        """Train to the end; return False where all shards were lost, and it is to be tried again
        from the newest checkpoint.
        """
        try:
            with self._optimizer(template, params) as optimizer:
                self._with_team(optimizer)
        except (ShardLost, Unrecoverable) as error:
            self.recoveries.count(self.reached, error)
            self._tell("on_message", f"{error}; beginning anew from the newest checkpoint")
            return False
        return True

    def _with_team(self, optimizer: DistNadam) -> None:
        team: WorkerGroup | None = None
        size = self.topology["num_workers"]
        saved_with = {"task": self.label, "seed": self.seed, "num_workers": size}
        saves = CheckpointManager(
            self.claim,
            self.plan.keep,
            saved_with,
            partial(self._tell, "on_save"),
            partial(self._tell, "on_message"),
        )
        try:
            if self.plan.save_every is not None:
                optimizer.reserve()
            self._tell("on_begin", begin := optimizer.round, self.plan.steps)
            team = optimizer.team(
                partial(_member, task=self.task, optimizer=optimizer, world_size=size)
            )
            ranks = RankRunner(
                team, size, optimizer, self.recoveries, partial(self._tell, "on_message")
            )
            try:
                self._train(optimizer, ranks, saves, begin)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True  # it came between two segments, where nothing is pending
                saves.save(optimizer, optimizer.round, wait=True)
                self._tell("on_message", f"saved step {optimizer.round} of {self.plan.steps}")
        finally:
            saves.give_up()
            optimizer.close()  # first: it releases workers that wait for one that is gone
            if team is not None:
                team.close()

    def _train(
        self, optimizer: DistNadam, ranks: RankRunner, saves: CheckpointManager, step: int
    ) -> None:
        plan, length = self.plan, 1
        if step >= plan.steps:
            self._tell("on_message", f"nothing to do: {step} of {plan.steps} steps are done")
            self._evaluate(optimizer, step)
        while step < plan.steps and not self.interrupted:
            end = min(step + length, plan.boundary_after(step))
            began = time.monotonic()
            losses = self._segment(ranks, end)
            length = max(
                1,
                min(
                    2 * length, int(SEGMENT_S * (end - step) / max(time.monotonic() - began, 1e-6))
                ),
            )
            for done, loss in losses.items():
                if done >= step:  # earlier ones were told before the shards went back
                    self._tell("on_step", done + 1, loss)
            step = self.reached = end
            self._at_boundary(optimizer, ranks, saves, step)

    def _at_boundary(
        self, optimizer: DistNadam, ranks: RankRunner, saves: CheckpointManager, step: int
    ) -> None:
        """Evaluate and save where that is due; where the shards went back meanwhile, train up to
        here again first.
        """
        wait = step == self.plan.steps or self.interrupted
        due = (
            [self._evaluate]
            if self.plan.due(self.plan.evaluate_every, step) and not self.interrupted
            else []
        )
        due += (
            [partial(saves.save, wait=wait)]
            if self.plan.due(self.plan.save_every, step) or self.interrupted
            else []
        )
        while due:
            try:
                due[0](optimizer, step)
                due.pop(0)
            except Rewound:
                self._segment(ranks, step)
        saves.poll()
        if self.interrupted:
            self._tell("on_message", f"saved step {step} of {self.plan.steps}")

    def _segment(self, ranks: RankRunner, end: int) -> dict[int, float]:
        """Run one segment to its end, also where Ctrl-C comes meanwhile; a second one raises."""
        ranks.begin(end)
        try:
            return ranks.finish()
        except KeyboardInterrupt:
            self.interrupted = True
            self._tell(
                "on_message",
                "stopping after the running steps, then saving (Ctrl-C again: stop now, without "
                "saving)",
            )
            return ranks.finish()

    def _evaluate(self, optimizer: DistNadam, step: int) -> None:
        params = optimizer.get_params()
        with task_errors(f"evaluate after step {step}"):
            metrics = {name: float(value) for name, value in self.task.evaluate(params).items()}
        self._tell("on_evaluate", step, metrics)

    def _optimizer(self, template: DistNadam | None, params: Any) -> DistNadam:
        """Return a built optimizer: restored where there is something to resume, else new."""
        config = (template or DistNadam()).get_config() | self.topology
        rate_to_dict(
            config["lr"]
            # a function that no checkpoint can hold is refused before the first step, not at the
            # first save
        )
        found = self._checkpoint()
        if found is None:
            return DistNadam.from_config(config).build(params)
        self._check_same_run(found[1], Layout.of(params))
        if template is not None:
            self._tell_what_stays(found[1].config, config)
        self.history.resumed_from = (
            Path(found[0]) if isinstance(found[0], LocalDirectory) else str(found[0])
        )
        return DistNadam.restore(
            found[0],
            **self.topology,
            name=config["name"],
            options=DistNadam.from_config(config).options,
        )

    def _checkpoint(self) -> tuple[Directory, Manifest] | None:
        resume, existing = self.plan.resume, store.step_directories(self.claim.directory)
        if not existing:
            if resume == "must":
                raise CheckpointError(f"{self.claim.directory}: holds no checkpoint to resume from")
            return None
        if resume == "never":
            raise CheckpointError(
                f"{self.claim.directory}: holds checkpoints, the newest {existing[-1].name}; "
                "resume it, or choose another"
            )
        path, manifest, passed_over = store.find(self.claim.directory)
        for sentence in passed_over:
            self._tell("on_message", f"passed over: {sentence}")
        self._tell("on_message", f"resuming from {path}")
        return path, manifest

    def _check_same_run(self, manifest: Manifest, layout: Layout) -> None:
        saved = manifest.data
        for key, ours in (("task", self.label), ("seed", self.seed)):
            if saved.get(key) != ours:
                raise CheckpointError(
                    f"{self.claim.directory}: its checkpoint is of {key} {saved.get(key)!r}, this "
                    f"run's is {ours!r}; choose another directory"
                )
        if Layout.from_dict(manifest.layout) != layout:
            raise CheckpointError(
                f"{self.claim.directory}: its checkpoint has other tensors than the task's; choose "
                "another directory"
            )
        if saved.get("num_workers") != self.topology["num_workers"]:
            self._tell(
                "on_message",
                f"the run had {saved.get('num_workers')} workers and goes on with "
                f"{self.topology['num_workers']}: batches are dealt"
                " differently from here on, so it will not end with the bits that it would have",
            )

    def _tell_what_stays(self, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        kept = [
            f"{key}={saved[key]!r} (not {asked.get(key)!r})"
            for key in saved
            if saved[key] != asked.get(key)
        ]
        if kept:
            self._tell(
                "on_message",
                f"the run goes on with its checkpoint's {', '.join(kept)}; set optimizer.lr, or "
                "start another run",
            )

    def _plot(self) -> None:
        try:
            self.history.plot_path = plot_loss(self.history.metrics_path, self.root / "loss.png")
        except TrainingError as error:
            self._tell("on_message", f"no plot: {error}")

    def _tell(self, event: str, *args: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*args)


def _member(rank: int, *, task: Task, optimizer: DistNadam, world_size: int) -> RankLoop:
    return RankLoop(task, optimizer.worker(rank), world_size)
