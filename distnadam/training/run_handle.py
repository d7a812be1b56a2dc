"""What a callback sees of its run: the optimizer, where the run stands, and how to stop it."""

from dataclasses import dataclass, field
from pathlib import Path

from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.errors import LifecycleError
from distnadam.optimizer import DistNadam


@dataclass(kw_only=True)
class RunHandle:
    """The run, to its callbacks.

    Attributes:
        directory: the run's local directory.
        task: the task's name.
        steps: steps in all.
        step: steps done, as far as they were reported.
        num_workers: ranks.
        stopped: why a callback stopped the run, if one did.
    """

    directory: Path
    task: str
    steps: int
    num_workers: int
    step: int = 0
    stopped: str | None = None
    _optimizer: DistNadam | None = field(default=None, repr=False)

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

    def follow(self, optimizer: DistNadam | None) -> None:
        """Show another optimizer; for `fit`."""
        self._optimizer = optimizer

    def stop(self, reason: str) -> None:
        """End the run after the running steps, with a checkpoint; `fit` returns as at its end."""
        self.stopped = self.stopped or reason

    def save(self, path: DirectoryLike) -> str:
        """Save a checkpoint of the present step in a directory of its own; return its place.

        It can be restored by `DistNadam.restore`; a run resumes from its own directory only.
        """
        return self.optimizer.save(path)
