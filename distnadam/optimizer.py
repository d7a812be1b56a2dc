"""`DistNadam`: the Keras-style face of the shards. It checks and delegates. No maths, no Ray."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, overload

from distnadam.backends import factory
from distnadam.backends.base import WorkerGroup
from distnadam.checkpoint import store
from distnadam.checkpoint.contents import packed_data
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import DirectoryLike, open_directory
from distnadam.checks import check_processes, check_shares
from distnadam.client.autodiff import gradients_found, gradients_of
from distnadam.client.building import restored_settings, running, warn_of_tied
from distnadam.client.checkpointing import Saved, SaveHandle
from distnadam.client.held_state import HeldState
from distnadam.client.in_flight_push import REFUSED, refusal_of
from distnadam.client.lifecycle import Lifecycle
from distnadam.client.shard_group import ShardGroup
from distnadam.client.ticket import Ticket
from distnadam.config import BackendName, Options, Settings
from distnadam.groups import Group
from distnadam.hyperparameters import Clocks, Formula, PullDtype
from distnadam.loss_scale import LossScale
from distnadam.nadam.step_overrides import Betas, BetasByGroup, Rates
from distnadam.schedules import Rate, kept
from distnadam.tensors.arrays import Array
from distnadam.tensors.layout import Layout
from distnadam.worker import Worker

Data = Mapping[str, Any]


class DistNadam(HeldState, set_once={"saves", "restored_data"}):
    """Nadam of TensorFlow 1.13's `tf.keras.optimizers`, with its state sharded over processes.

    "Nadam" is several formulas. The default is the reference's; torch.optim.NAdam is the same one
    with eps=1e-8 and momentum_decay=schedule_decay, Keras 3 is it with schedule_decay=1. The same
    kernel computes others: see `formula`, and `DistNadamW`, `DistAdam`, `DistAdamW`.

    Args:
        lr: learning rate, a float or a function of the steps applied (see `distnadam.schedules`).
        beta_1, beta_2: decay of the first and of the second moment, in [0, 1).
        epsilon: added to the root of the second moment; None means 1e-7.
        schedule_decay: how fast the momentum schedule approaches beta_1.
        clipnorm: largest norm of each tensor's mean gradient; None does not clip.
        clipvalue: largest magnitude of each element of the mean gradient, after the norms.
        global_clipnorm: largest norm of the mean gradient over all tensors; excludes `clipnorm`.
        sum_group: ranks whose gradients are summed first, before the sums are added: rank r is in
            group r // sum_group. The bits depend on it; with 1 rank is added to rank.
        pull_dtype: "bfloat16" has workers see float32 parameters rounded to it (see `Worker`).
        formula: "nadam"; "nadam_optax" and "nadam_algoperf", whose momentum is constant; "adam",
            as torch and optax compute it; or "adam_keras", whose epsilon is not corrected.
        weight_decay: what each step takes from a parameter: ``lr * weight_decay`` of it before the
            step if `decoupled_weight_decay`, else `weight_decay` of it by way of its gradient (L2).
        maximize: step along the gradient, not against it.
        groups: tensors with settings of their own; the first `Group` that matches a path holds.
        use_ema: keep an exponential moving average of the parameters: see `get_ema_params`.
        ema_momentum: the weight of the average so far in the next one, in [0, 1].
        ema_overwrite_frequency: after how many steps the parameters become the average; None never.
        clocks: "one" for all tensors, which all step at every step; or "tensor": one whose gradient
            is None on all ranks keeps its parameters, moments, average and clock.
        loss_scale: a `LossScale`: the shards keep a scale for workers' losses, and take gradients
            of scaled ones; None: they take them as they are.
        num_shards: shards that the state is cut into; the result does not depend on it.
        num_workers: ranks whose gradients are averaged at each step.
        replicas: standbys per shard, 0 or 1; they take over at the same round (Ray only).
        backend: "local" (this process, Ray never imported), "ray", or "auto": Ray if one runs in
            this process, if RAY_ADDRESS names one, or if several shards or workers are asked for
            and Ray is installed; else local.
        name: lets `connect` find the optimizer, and it outlives this process (Ray only).
        options: rare settings.

    Raises:
        ConfigError: (a ValueError) naming the argument and its value.
        LifecycleError: in methods and properties that need shards: there are none yet, or no more.

    >>> with DistNadam(lr=0.1, backend="local").build({"w": np.ones(2, np.float32)}) as optimizer:
    ...     optimizer.apply_gradients({"w": np.float32([1, -1])})
    ...     [round(float(value), 3) for value in optimizer.get_params()["w"]]
    1
    [0.894, 1.106]
    """

    def __init__(
        self,
        lr: Rate = 0.002,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float | None = None,
        schedule_decay: float = 0.004,
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        sum_group: int = 1,
        pull_dtype: PullDtype | None = None,
        formula: Formula = "nadam",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        groups: Sequence[Group] = (),
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        clocks: Clocks = "one",
        loss_scale: LossScale | None = None,
        num_shards: int = 1,
        num_workers: int = 1,
        replicas: int = 0,
        backend: BackendName = "auto",
        name: str | None = None,
        options: Options | None = None,
        **unknown: Any,
    ) -> None:
        given = dict(locals())  # before it binds a name of its own
        del given["self"], given["unknown"]
        self._life = Lifecycle(Settings.of(**given, **unknown))
        self.saves = self._life.saves
        self._own_worker: Worker | None = None
        self.restored_data: dict[str, Any] = {}

    def build(self, params: Any) -> Self:
        """Lay the model out and start the shards.

        Args:
            params: the initial parameters: any nesting of dict (or OrderedDict; keys sorted), list
                and tuple of NumPy, torch or JAX arrays of float32, float64, float16 or bfloat16
                (which get float32 masters), of any shape. One array under two paths (tied) becomes
                two parameters, equal while their gradients are, and a warning names both.

        Raises:
            StructureError: naming the path of a leaf or container that cannot be a parameter.
            ClusterError: the shards cannot be obtained.
            LifecycleError: already built, or closed.
        """
        layout = Layout.of(params)
        flat = layout.flat(params, what="params")
        warn_of_tied(layout, params)
        self._life.start(layout, lambda shards: shards.load(flat))
        if self.options.checkpoint_dir is not None:
            self.save(self.options.checkpoint_dir)
        return self

    def close(self) -> None:
        """Finish a background save and raise its error; end the shards if this object made them."""
        self._life.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.saves.give_up()  # the error that ended the block is the one to raise
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {vars(self).get('_life', 'not made')}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, self._life.for_pickling()

    @classmethod
    def connect(cls, name: str) -> "DistNadam":
        """Attach to a running optimizer from any process of its cluster, once it has parameters.

        Raises:
            NotRunning: no optimizer of that name runs.
            VersionMismatch: it runs with another version of this package.
            StepTimeout: whoever builds it does not give it parameters.
        """
        return _attach(*running(name))

    @classmethod
    def stop(cls, name: str) -> None:
        """End a running optimizer as its creator's `close` would, or raise NotRunning."""
        factory.stop(name)

    @property
    def shards(self) -> ShardGroup:
        """The running shards, for the package's own use; raise LifecycleError if there are none."""
        return self._life.shards

    @property
    def lr(self) -> Rate:
        """The learning rate, a float or a schedule; set, it holds from the next step on.

        Raises:
            ConfigError, LifecycleError, StepTimeout: when it is set, as `set_config`.
        """
        return kept(self._life.config.lr)

    @lr.setter
    def lr(self, value: Rate) -> None:
        self._life.set_config({"lr": value})

    def set_config(self, **values: Any) -> None:
        """Change hyper-parameters from the next step on, on all shards between the same two steps.

        What is not given stays as it is. With the formula "nadam" each step's own beta_1 enters the
        product of its momentum; constant momentum, and beta_2, are powers of the present value.

        Args:
            values: any of lr, beta_1, beta_2, epsilon, schedule_decay, weight_decay, clipnorm,
                clipvalue, global_clipnorm (None: no clipping), ema_momentum, and `groups` with the
                same patterns in the same order and the same `trainable`.

        Raises:
            ConfigError: naming a setting that is out of its range, or cannot be changed, and why;
                nothing was changed.
            LifecycleError: `fit` steps this optimizer, and this is no place to change it.
            StepTimeout: the shards could not be held between two rounds; where clipping by norm is
                begun or ended, a round whose norms are summed already is awaited.
        """
        self._life.set_config(values)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the values of now, for `from_config`."""
        return self._life.settings.with_config(self._life.config).to_config()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DistNadam":
        """Return an optimizer, not yet built, made from what `get_config` returned.

        Raises:
            ConfigError, TypeError: as the constructor.
        """
        return cls(**config)

    def get_gradients(self, loss: Any, params: Any) -> list[Array]:
        """Return the gradient of `loss` for each parameter, in `get_weights`' order, unclipped.

        Args:
            loss: a callable on NumPy arrays that returns ``(loss, gradients)``, or a scalar if JAX
                can differentiate it; or a torch loss tensor, with `params` its torch tensors.
            params: the parameters, in any nesting of dict, list and tuple.

        Raises:
            GradientError: (a ValueError) naming the parameter whose gradient cannot be computed.
        """
        return gradients_of(loss, params, self._life.layout or Layout.of(params))

    def get_updates(self, loss: Any, params: Any) -> Ticket:
        """Push the gradients of `loss` at `params`; return the ticket, whose `result` waits.

        Raises:
            LifecycleError: there are several workers, each of which must push for itself.
        """
        self._life.require_one_worker()
        gradients = gradients_found(loss, params, self.shards.layout)
        self._own_worker = self._own_worker or self.worker(0)
        return self._own_worker.push(self.shards.layout.unflatten(gradients))

    def apply_gradients(
        self,
        gradients: Any,
        *,
        found_inf: bool = False,
        lr: Rates | None = None,
        betas: Betas | BetasByGroup | None = None,
    ) -> int:
        """Apply one step from an already averaged gradient tree; return how many steps are applied.

        With `found_inf` (they overflowed) the round is skipped, and `gradients` may be None. `lr`
        and `betas` are of this step alone, as `Worker.push` takes them.

        Raises:
            StructureError: naming the tensor's path, the expected and the given.
            NonFiniteGradient: naming the tensor (`Options(on_nonfinite="skip")` counts a skip).
            PushesPending: workers have pushed for the coming round.
            Rewound: a shard died and all went back to round `error.step`; compute again.
            In each case nothing of this gradient was applied.
        """
        shards = self._life.shards_to_change()
        decided = shards.step(gradients, found_inf=found_inf, lr=lr, betas=betas)
        if decided.outcome in REFUSED:
            raise refusal_of(decided)
        return decided.iterations

    def worker(self, rank: int) -> Worker:
        """Return a new worker for a rank; one that had it before is refused from then on. Raise
        ConfigError for a rank that is not one of 0 to `num_workers` - 1.
        """
        self._life.check_rank(rank)
        return Worker(self.shards, rank)

    def team(self, make: Callable[..., Any], *given: Any) -> WorkerGroup:
        """Return `make(rank, *copies of given)` of each rank: a thread if local, else an actor."""
        return self.shards.backend.worker_group(self._life.num_workers, make, self.options, given)

    def reshard(self, num_shards: int, *, shares: Sequence[int] | None = None) -> None:
        """Cut the state into other shards, between two steps; the bits stay the same.

        Args:
            num_shards: how many there are then.
            shares: each shard's share of the state, whole numbers of any size, in the order of the
                shards; None for equal ones. As many shards as there were stay on their hosts.

        Raises:
            ClusterError: the new shards cannot be obtained; the present ones go on.
            ConfigError: the shares are not that many, one is below 0, or all are 0.
        """
        shards, given = self.shards, check_shares(shares, check_processes("num_shards", num_shards))
        self.saves.finish()  # the present shards are writing it
        shards.reshard(given)

    @overload
    def save(
        self, path: DirectoryLike, *, wait: Literal[True] = True, data: Data | None = None
    ) -> str: ...

    @overload
    def save(
        self, path: DirectoryLike, *, wait: bool, data: Data | None = None
    ) -> str | SaveHandle: ...

    def save(
        self, path: DirectoryLike, *, wait: bool = True, data: Data | None = None
    ) -> str | SaveHandle:
        """Write the state of one round to ``path/step_<round>/`` and return that directory.

        Args:
            path: a directory on a disk that all nodes with shards share, or a URL (s3://bucket/run).
            wait: False copies the state into memory kept for it (12 bytes per float32 element, 16
                with `use_ema`), returns a handle (`result()`, `done()`) and writes behind the
                training. The next save waits for it; its error is raised by `result()`, else by the
                next call that changes or saves the state, or by `close()`.
            data: what to keep beside the state, as it is now, such as a position in the data or
                ``rng.bit_generator.state``; `restored_data` gives it back, equal. A dict of None,
                numbers, str, bytes, list, tuple, dict, and NumPy arrays and scalars.

        Raises:
            CheckpointError: naming the file that could not be written; earlier checkpoints stay.
            ConfigError: the learning rate is a plain function, which cannot be stored, or `data`
                holds something else, named by its key; nothing was written.
        """
        shards, root = self._life.shards_to_change(), open_directory(path)
        saved = Saved(settings=self._life.settings, data=packed_data(data))
        return (self.saves.save if wait else self.saves.save_async)(shards, root, saved)

    def reserve(self) -> None:
        """Allocate the memory for `save(..., wait=False)` now, so that the first one is as fast."""
        self.saves.reserve(self.shards)

    @classmethod
    def restore(
        cls,
        path: DirectoryLike,
        *,
        num_shards: int | None = None,
        num_workers: int | None = None,
        replicas: int | None = None,
        backend: BackendName | None = None,
        name: str | None = None,
        options: Options | None = None,
    ) -> "DistNadam":
        """Return a built optimizer that goes on where a checkpoint stopped; None means as saved.

        Args:
            path: one checkpoint, which is loaded or refused; or a directory of checkpoints, whose
                newest valid one is loaded, with a warning for each that was passed over. A local
                path or an fsspec URL.
            num_shards, num_workers, replicas: shards, ranks, and standbys per shard, from now on.
            backend: None means "auto".
            name: the new optimizer's name; "" for none. A local one never has one.
            options: rare settings.

        Raises:
            CheckpointError: naming the file that was refused, and why.
        """
        asked: dict[str, Any] = {"num_shards": num_shards, "num_workers": num_workers}
        asked |= {"replicas": replicas, "backend": backend, "name": name}

        def load(directory: Directory, manifest: Manifest) -> DistNadam:
            settings = restored_settings(directory, manifest, asked, options)
            return cls.of(settings, (directory, manifest))

        return store.load_first_valid(path, load)

    @classmethod
    def of(cls, settings: Settings, found: tuple[Directory, Manifest] | None = None) -> "DistNadam":
        """Return an optimizer, built if there is a checkpoint; for the package's own use."""
        optimizer = cls(**settings.to_arguments())
        optimizer._life.belong_to(settings.run)
        if found is not None:
            optimizer._life.restore(*found)
            optimizer.restored_data.update(found[1].user_data)
        return optimizer

    def follow(self, leader: "DistNadam | None", refusal: str | None = None) -> None:
        """Have the leader's hyper-parameters, which a `refusal` keeps as they are; for `fit`."""
        self._life.follow(None if leader is None else leader._life, refusal)


def _attach(shards: ShardGroup | None, settings: Settings) -> DistNadam:
    """Return a handle on running shards, if any, which closing it leaves alone."""
    optimizer = DistNadam.of(settings)
    optimizer._life.attach(shards)
    return optimizer
