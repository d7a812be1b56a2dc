"""`DistNadam`: the Keras-style face of the shards. No maths, no Ray, no files: it checks,
delegates, and puts trees together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Self, overload

import numpy as np

from distnadam.backends import factory
from distnadam.backends.base import WorkerGroup
from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import Manifest
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import DirectoryLike, open_directory
from distnadam.client.autodiff import gradients_of
from distnadam.client.building import restored_settings, settings_of, start_shards
from distnadam.client.checkpointing import CheckpointWriter, Saved, SaveHandle
from distnadam.client.keras_weights import from_weights, to_weights
from distnadam.client.shard_group import ShardGroup
from distnadam.config import (
    DEFAULT_EPSILON,
    BackendName,
    NadamConfig,
    Options,
    Settings,
    Topology,
    check_count,
)
from distnadam.errors import ConfigError, LifecycleError, NonFiniteGradient, StructureError
from distnadam.schedules import Rate, rate_from, rate_to_dict
from distnadam.tensors.arrays import Array
from distnadam.tensors.layout import Layout
from distnadam.worker import Ticket, Worker


class DistNadam:
    """Nadam as TensorFlow 1.13's `tf.keras.optimizers.Nadam` computes it, with its state sharded
    over processes.

    "Nadam" is several formulas. This is the one of the reference and of tf_keras's legacy
    optimizers; torch.optim.NAdam is the same one with eps=1e-8 and momentum_decay=schedule_decay,
    Keras 3 is it with schedule_decay=1, optax.nadam has no momentum schedule.

    Args:
        lr: learning rate, a float or a function of the number of steps already applied (see
            `distnadam.schedules`).
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment; None means 1e-7.
        schedule_decay: how fast the momentum schedule approaches beta_1.
        clipnorm: largest norm of each tensor's mean gradient; None does not clip.
        clipvalue: largest magnitude of each element of the mean gradient, after the norms.
        global_clipnorm: largest norm of the mean gradient over all tensors; excludes `clipnorm`.
        num_shards: shards that the state is cut into; the result does not depend on it.
        num_workers: ranks whose gradients are averaged at each step.
        replicas: standbys per shard, 0 or 1, on another node where there is one; a shard whose
            process dies is then taken over at the same round (Ray only: a local optimizer lives and
            dies with its process).
        backend: "local" (this process, Ray never imported), "ray", or "auto": Ray where one runs in
            this process, where RAY_ADDRESS names one, or where several shards or workers are asked
            for and Ray is installed; else local.
        name: makes the optimizer findable by `connect` and lets it outlive this process (Ray only).
        options: rare settings.

    Raises:
        ConfigError: (a ValueError) naming the argument and its value.
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
        num_shards: int = 1,
        num_workers: int = 1,
        replicas: int = 0,
        backend: BackendName = "auto",
        name: str | None = None,
        options: Options | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            hint = "; did you mean lr?" if "learning_rate" in unknown else ""
            raise TypeError(
                f"DistNadam got an unexpected keyword argument {next(iter(unknown))!r}{hint}"
            )
        config = NadamConfig(
            lr=rate_from(lr),
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=DEFAULT_EPSILON if epsilon is None else epsilon,
            schedule_decay=schedule_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
        )
        topology = Topology(
            num_shards=num_shards,
            num_workers=num_workers,
            replicas=replicas,
            backend=backend,
            name=name,
        )
        self._settings = Settings(config=config, options=Options.of(options), topology=topology)
        self._shards: ShardGroup | None = None
        self._own_worker: Worker | None = None
        self._creator = True
        self._closed = False
        self.saves = CheckpointWriter()
        self.restored_data: dict[str, Any] = {}

    # Life

    def build(self, params: Any) -> Self:
        """Lay the model out and start the shards.

        Args:
            params: the initial parameters: any nesting of dict (keys sorted), list and tuple of
                NumPy, torch or JAX arrays of float32, float64, float16 or bfloat16, of any shape;
                the half ones get float32 masters.

        Raises:
            StructureError: naming the path of a leaf or container that cannot be a parameter.
            ClusterError: the shards cannot be had.
            LifecycleError: already built, or closed.
        """
        layout = Layout.of(params)
        flat = layout.flat(params, what="params")
        self._start(layout, lambda shards: shards.load(flat))
        if self.options.checkpoint_dir is not None:
            self.save(self.options.checkpoint_dir)
        return self

    def close(self) -> None:
        """Finish a background save, and raise its error; end the shards where this object made
        them, otherwise only let go of them.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.saves.finish()
        finally:
            if self._shards is not None:
                self._shards.backend.close(destroy=self._creator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.saves.give_up()  # what ended the block is told
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.shards.backend.name == "local":
            raise LifecycleError(
                "a local optimizer lives in its process and cannot be pickled; use backend='ray' "
                "to share it"
            )
        return _attach, (self._shards, self._settings)

    @classmethod
    def connect(cls, name: str) -> "DistNadam":
        """Attach to a running optimizer by its name, from any process of the Ray cluster; raise
        NotRunning where there is none.
        """
        backend, spec = factory.connect(name)
        shards = ShardGroup(backend, spec.layout, spec.num_shards, spec.options)
        return _attach(shards, settings_of(spec))

    @classmethod
    def stop(cls, name: str) -> None:
        """End a running optimizer by its name, as its creator's `close` would; raise NotRunning
        where there is nothing of one.
        """
        factory.stop(name)

    # The present

    @property
    def shards(self) -> ShardGroup:
        """The running shards, for the package's own use; raise LifecycleError if there are none."""
        if self._closed:
            raise LifecycleError("this optimizer was closed")
        if self._shards is None:
            raise LifecycleError("this optimizer has no parameters yet: call build(params) first")
        return self._shards

    @property
    def backend_name(self) -> str:
        """ "local" or "ray", once built."""
        return self.shards.backend.name

    @property
    def options(self) -> Options:
        """The rare settings it was made with."""
        return self._settings.options

    @property
    def iterations(self) -> int:
        """Steps applied so far."""
        return self.shards.describe().iterations if self._is_built() else 0

    @property
    def round(self) -> int:
        """Rounds decided so far: applied, skipped or refused; batches follow it."""
        return self.shards.describe().round if self._is_built() else 0

    @property
    def skipped(self) -> int:
        """Rounds that ended with no step, because a gradient was not finite."""
        return self.shards.describe().skipped if self._is_built() else 0

    @property
    def lr(self) -> Rate:
        """The learning rate, a float or a schedule; setting it takes effect on every shard from the
        next step on.
        """
        return self.shards.describe().lr if self._is_built() else self._settings.config.lr

    @lr.setter
    def lr(self, value: Rate) -> None:
        settings = self._settings.with_lr(rate_from(value))
        if self._is_built():
            self._changing().set_rate(settings.config.lr)
        self._settings = settings

    def get_params(self) -> Any:
        """Return a copy of the parameters in the structure given to `build`, each in its own dtype;
        shape () as a NumPy scalar.

        Raises:
            Rewound: a shard died and all went back to round `error.step` since this handle last
                looked, as every method that reads, writes or steps the whole says once.
        """
        shards = self.shards
        return shards.layout.tree(shards.read(("params",))[1]["params"])

    def set_params(self, params: Any) -> None:
        """Replace the parameters; moments and clock stay. Pushes on their way are refused with
        StaleEpoch.

        Raises:
            StructureError: naming the tensor that is missing, unexpected, of another shape or not
                finite; nothing was changed.
        """
        shards = self._changing()
        flat = shards.layout.flat(params, what="params")
        for tensor, view in zip(shards.layout.tensors, shards.layout.views(flat), strict=True):
            if not np.isfinite(view).all():
                raise StructureError(
                    f"params: {tensor.path!r}: expected finite values, got NaN or infinity"
                )
        shards.fill({"params": flat})

    def get_weights(self) -> list[Array]:
        """Return ``[iterations, m_schedule, *ms, *vs]`` as Keras orders them: 0-d int64, 0-d
        float64, arrays of the tensors' shapes.
        """
        shards = self.shards
        clock, state = shards.read(("m", "v"))
        return to_weights(shards.layout, clock, state["m"], state["v"])

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Take what `get_weights` returned, here or in Keras (whose m_schedule is float32). Pushes
        on their way are refused.

        Raises:
            StructureError: (a ValueError) naming the expected and given length, or the index and
                the expected and given shape.
        """
        shards = self._changing()
        clock, m, v = from_weights(shards.layout, weights)
        shards.fill({"m": m, "v": v}, clock)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as given, the learning rate as it is now;
        `from_config` takes them.
        """
        lr = self.lr
        plain = lr if callable(lr) and not is_dataclass(lr) else rate_to_dict(lr)
        arguments = self._present_settings().to_arguments()
        return arguments | {"lr": plain, "options": self.options.to_dict()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DistNadam":
        """Return an optimizer, not yet built, of what `get_config` returned."""
        return cls(**config)

    # Steps

    def get_gradients(self, loss: Any, params: Any) -> list[Array]:
        """Return the gradient of `loss` with respect to each parameter, in the order of
        `get_weights`, unclipped.

        The reference clips here; clipping acts on the mean gradient instead, so that with one
        worker the trajectory is the same.

        Args:
            loss: a callable on NumPy arrays that returns ``(loss, gradients)``; or one that returns
                a scalar and that JAX can differentiate; or a torch loss tensor, with `params` the
                torch tensors it came from.
            params: the parameters, in any nesting of dict, list and tuple.

        Raises:
            GradientError: (a ValueError) naming the parameter whose gradient cannot be computed.
        """
        return gradients_of(
            loss, params, Layout.of(params) if self._shards is None else self._shards.layout
        )

    def get_updates(self, loss: Any, params: Any) -> Ticket:
        """Compute the gradients of `loss` at `params`, push them, and return the pending update;
        its `result` waits for the step.

        Raises:
            LifecycleError: there are several workers, each of which must push for itself.
        """
        if self._settings.topology.num_workers != 1:
            raise LifecycleError(
                "get_updates pushes for the only worker, and there are "
                f"{self._settings.topology.num_workers}: use worker(rank) in each"
            )
        layout = self.shards.layout
        gradients = gradients_of(loss, params, layout)
        if self._own_worker is None:
            self._own_worker = self.worker(0)
        return self._own_worker.push(layout.unflatten(gradients))

    def apply_gradients(self, gradients: Any) -> int:
        """Apply one step from an already averaged gradient tree and return the number of steps
        applied.

        Raises:
            StructureError: naming the tensor's path, the expected and the given; nothing was
                applied.
            NonFiniteGradient: naming the tensor; nothing was applied
                (`Options(on_nonfinite="skip")` counts it as skipped instead).
            PushesPending: workers have pushed for the coming round.
            Rewound: a shard died and all went back to round `error.step`; nothing of this gradient
                is left.
        """
        decided = self._changing().step(gradients)
        if decided.outcome == "refused":
            raise NonFiniteGradient(
                f"round {decided.round} was refused, no shard has moved: {decided.rejection}"
            )
        return decided.iterations

    def worker(self, rank: int) -> Worker:
        """Take rank `rank` over, in any process that holds this optimizer; a worker that held it
        before is refused from then on.
        """
        num_workers = self._settings.topology.num_workers
        if not 0 <= check_count("rank", rank, least=0) < num_workers:
            raise ConfigError(f"rank must be in [0, {num_workers}), got {rank!r}")
        return Worker(self.shards, rank)

    def waiting_for(self) -> tuple[int, ...]:
        """Return the ranks whose push the coming round lacks."""
        return self.shards.describe().waiting_for

    def lost_ranks(self) -> dict[int, int]:
        """Return the ranks whose worker died and that nobody has taken over yet, with the number of
        the worker that died.
        """
        return self.shards.backend.supervisor.lost_ranks()

    def team(self, make: Callable[[int], Any]) -> WorkerGroup:
        """Return one object per rank, made by `make(rank)` in a thread where local, in a Ray actor
        otherwise: the workers of `fit`.
        """
        return self.shards.backend.worker_group(
            self._settings.topology.num_workers, make, self.options
        )

    def reshard(self, num_shards: int) -> None:
        """Cut the state anew into so many shards, between two steps; training waits only for the
        move itself, and keeps its bits.

        Raises:
            ConfigError: the number is less than 1.
            ClusterError: the new shards cannot be had; the present ones go on.
        """
        shards, count = self.shards, check_count("num_shards", num_shards)
        self.saves.finish()  # the present shards are writing it
        shards.reshard(count)

    # Checkpoints

    @overload
    def save(
        self,
        path: DirectoryLike,
        *,
        wait: Literal[True] = True,
        data: Mapping[str, Any] | None = None,
    ) -> str: ...

    @overload
    def save(
        self, path: DirectoryLike, *, wait: bool, data: Mapping[str, Any] | None = None
    ) -> str | SaveHandle: ...

    def save(
        self, path: DirectoryLike, *, wait: bool = True, data: Mapping[str, Any] | None = None
    ) -> str | SaveHandle:
        """Write the state of one round to ``path/step_<round>/`` and return that directory.

        Args:
            path: a local directory, on a disk that every node with a shard shares, or an fsspec URL
                such as s3://bucket/run.
            wait: False copies the state to memory kept for it (12 bytes per float32 element, from
                the first such save or `reserve` on), returns a handle (`result()`, `done()`), and
                writes behind the training. The next save waits for it; its error is raised by
                `result()`, else by the next call that changes or saves the state, or by `close()`.
            data: plain data to keep beside the state, such as the position in the data;
                `restored_data` gives it back.

        Raises:
            CheckpointError: naming the file that could not be written; earlier checkpoints stay as
                they were.
            ConfigError: the learning rate is a plain function, which cannot be stored.
        """
        shards = self._changing()
        root = open_directory(path)
        saved = Saved(settings=self._present_settings(), data=dict(data or {}))
        return (
            self.saves.save(shards, root, saved)
            if wait
            else self.saves.save_async(shards, root, saved)
        )

    def reserve(self) -> None:
        """Have the memory for `save(..., wait=False)` now, so that the first such save holds the
        training up no longer than any.
        """
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
        """Return a built optimizer that goes on where a checkpoint stopped, on any number of
        shards; what is None is as saved.

        Args:
            path: one checkpoint, which is then that one or an error; or a directory of checkpoints,
                of which the newest valid one: a warning says what was passed over. A local path or
                an fsspec URL.
            num_shards: shards to cut the state into.
            num_workers: ranks from now on.
            replicas: standbys per shard.
            backend: None means "auto".
            name: the new optimizer's name; "" for none. A local one never has one.
            options: rare settings.

        Raises:
            CheckpointError: naming the file that was refused, and why.
        """
        asked = {
            "num_shards": num_shards,
            "num_workers": num_workers,
            "replicas": replicas,
            "backend": backend,
            "name": name,
        }

        def load(directory: Directory, manifest: Manifest) -> DistNadam:
            settings = restored_settings(directory, manifest, asked, options)
            optimizer = cls(**settings.to_arguments())
            layout = Layout.from_dict(manifest.layout)
            optimizer._start(layout, lambda shards: shards.restore(directory, manifest))
            optimizer.restored_data = dict(manifest.data)
            return optimizer

        return store.load_first_valid(path, load)

    # What holds it together

    def _start(self, layout: Layout, fill: Callable[[ShardGroup], None]) -> None:
        if self._closed:
            raise LifecycleError("this optimizer was closed; make a new one")
        if self._shards is not None:
            raise LifecycleError("this optimizer is built already")
        self._shards = start_shards(self._settings, layout)
        try:
            fill(self._shards)
        except BaseException:
            self.close()
            raise

    def _present_settings(self) -> Settings:
        """Return the settings with as many shards as there are after a reshard."""
        shards = self._shards
        return self._settings if shards is None else self._settings.with_shards(len(shards.ranges))

    def _is_built(self) -> bool:
        if self._closed:
            raise LifecycleError("this optimizer was closed")
        return self._shards is not None

    def _changing(self) -> ShardGroup:
        """Return the shards, to be changed or saved; raise the error of a background save that
        failed.
        """
        self.saves.surface()
        return self.shards


def _attach(shards: ShardGroup, settings: Settings) -> DistNadam:
    """Return a handle on running shards, which closing it leaves alone."""
    optimizer = DistNadam(**settings.to_arguments())
    optimizer._creator = False
    optimizer._shards = shards
    return optimizer
