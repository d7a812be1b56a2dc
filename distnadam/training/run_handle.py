"""What a callback sees of its run: the optimizer, where the run stands, and how to stop it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.errors import LifecycleError
from distnadam.optimizer import DistNadam


def _nothing() -> None:
    """Nothing is to be done."""


@dataclass(kw_only=True)
class RunHandle:
    """The run, to its callbacks.

    Attributes:
        directory: the run's local directory.
        task: the task's name.
        steps: steps in all.
        step: steps done, as far as they were reported.
        num_workers: ranks.
        evaluate_every: steps between evaluations; None: only after the last.
        calls: which callback gets an event, or got the last, by its name in checkpoints.
        stops: why a callback stops the run, by its name, the first one first.
        say: shows the user a line, above the panel where there is one; it is not recorded.
    """

    directory: Path
    task: str
    steps: int
    num_workers: int
    evaluate_every: int | None = None
    step: int = 0
    calls: str | None = None
    stops: dict[str | None, str] = field(default_factory=dict)
    say: Callable[[str], object] = field(default=print, repr=False)
    _optimizer: DistNadam | None = field(default=None, repr=False)
    _before_save: Callable[[], None] = field(default=_nothing, repr=False)

    @property
    def optimizer(self) -> DistNadam:
        """The optimizer that the run steps; its `lr` and `set_config` may be set in `on_begin`,
        `on_evaluate` and what is called from there.

        Raises:
            LifecycleError: the shards are not there yet, or no longer.
        """
        if self._optimizer is None:
            raise LifecycleError("the run has no optimizer yet, or no longer")
        return self._optimizer

    def follow(
        self, optimizer: DistNadam | None, before_save: Callable[[], None] = _nothing
    ) -> None:
        """Show another optimizer, and do something before `save`; for `fit`."""
        self._optimizer = optimizer
        self._before_save = before_save

    def stop(self, reason: str) -> None:
        """End the run after the running steps, with a checkpoint; `fit` returns as at its end.

        Checkpoints from then on know of it: a run that resumes from one, with that callback, is
        over too, unless its `stops_again` says otherwise. Without it, it goes on.
        """
        self.stops.setdefault(self.calls, reason)

    @property
    def stopped(self) -> str | None:
        """Why a callback stopped the run, if one did."""
        return next(iter(self.stops.values()), None)

    def save(self, path: DirectoryLike) -> str:
        """Save a checkpoint of the present step in a directory of its own; return its place.

        It can be restored by `DistNadam.restore`; a run resumes from its own directory only.
        """
        self._before_save()  # the run's own save in flight is reported as such
        return self.optimizer.save(path)
