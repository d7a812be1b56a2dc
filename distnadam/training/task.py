"""The protocol of a task, which `fit` trains, and its name."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Task(Protocol):
    """A model and its data; any class with these methods is one.

    `init` is called once, in the process that called `fit`, for a resumed run too. Each worker gets
    a copy of the task as it is then, in local mode too: attributes that `init` sets, such as the
    seed or the data, reach them, and what one changes no other sees. So the task must be one that
    can be copied, by pickling; in local mode arrays that cannot be written are shared. What is no
    attribute of the task, such as a global of its module or an attribute of its class, is each
    process's own: on Ray each worker has one, in local mode all share it. The source of the task's
    module, and of what that imports from its own directory, goes to the workers too, as it was when
    the run began; installed packages and data files must be on their hosts.

    Equal arguments must give equal results, to the bit, or a run that recovers ends with other
    ones. Rank 0 looks at its first step whether they do, by doing it twice, and ends the run if
    not; a task that has ``deterministic = False`` is not looked at.

    A task whose training changes more than the parameters, as BatchNorm's averages, has two methods
    more:

        state() -> tree           what it is now: dicts, lists, tuples, numbers and arrays (NumPy's,
                                  torch's, JAX's), which a checkpoint holds beside the parameters;
                                  of some megabytes at most
        load_state(tree) -> None  take it back, with NumPy arrays

    Rank 0's counts: it is asked for when a checkpoint is saved and before an evaluation, which gets
    it first, and all ranks take it where a run goes on from a checkpoint (one that was saved from
    outside the run has none, and is passed over). Between those each rank changes its own, from its
    own batches. If a rank's process dies or its code raises, or shards go back, what it had cannot
    be computed again: all go back to the newest checkpoint, or to what `init` left, and come by the
    same steps to the same bits. That holds for rank 0's state, and for the parameters as long as
    gradients do not depend on the state (BatchNorm's in training do not).

        def state(self):          # of a torch module
            return dict(self.model.named_buffers())

        def load_state(self, state):
            for name, buffer in self.model.named_buffers():
                buffer.copy_(torch.tensor(state[name]))

    >>> class Mean:
    ...     def init(self, seed):
    ...         return {"w": np.random.default_rng(seed).random(2, np.float32)}
    ...     def batch(self, step, rank, world_size):
    ...         return np.random.default_rng((step, rank)).random((8, 2), np.float32)
    ...     def loss_and_gradients(self, params, batch):
    ...         error = params["w"] - batch.mean(0)
    ...         return float(error @ error), {"w": 2 * error}
    ...     def evaluate(self, params):
    ...         return {"largest": float(params["w"].max())}
    >>> isinstance(Mean(), Task)
    True
    """

    def init(self, seed: int) -> Any:
        """Return the initial parameters: any nesting of dict, list and tuple of arrays."""

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        """Return a rank's batch of a step, from 0; equal arguments must give equal batches.

        For `fit(..., accumulate=k)` with k above 1 it takes one argument more, by name:
        `micro_batch`, from 0 to k - 1.
        """

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        """Return the loss and its gradients, in the structure of the read-only `params`.

        These are what a worker sees: rounded, if the optimizer has a `pull_dtype`.

        For an optimizer with a `loss_scale` it takes one argument more, by name, `loss_scale`:
        the gradients are those of the loss multiplied by it, and the loss is as it is.
        """

    def evaluate(self, params: Any) -> Mapping[str, float]:
        """Return metrics of the parameters, by name; called in the process that called `fit`.

        They are never rounded to a `pull_dtype`.
        """


def task_name(task: Task) -> str:
    """Return the task's `name` attribute, or else its class's name in lower case."""
    return str(getattr(task, "name", type(task).__name__.lower()))
