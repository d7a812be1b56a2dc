"""What all optimizers for Keras 3 share: Keras's part of a step, and the shards'.

Keras unscales, counts, accumulates and constrains; the shards average over ranks, clip, decay and
step, and keep moments and average.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from typing_extensions import override

from distnadam.config import BackendName, Options
from distnadam.errors import ConfigError, StructureError
from distnadam.frontends.replica import Replica, Slots, distinct
from distnadam.groups import Group
from distnadam.hyperparameters import DEFAULT_SCHEDULE_DECAY, Formula
from distnadam.keras.scaling import refuse_compiled, refuse_wrapper, rescaled, scaled
from distnadam.keras.stored import arrays_of, slots_of
from distnadam.keras.variables import assign, is_traced, numpy_of
from distnadam.loss_scale import LossScale
from distnadam.tensors.arrays import Array
from distnadam.tensors.leaves import as_numpy

_OURS = ("num_shards", "replicas", "backend", "cluster_name")


class DistOptimizer(keras.optimizers.Optimizer):
    """The shards' side of a Keras optimizer; `DistNadam` and its sisters say which formula.

    A variable that has no gradient on any rank stands still, its clock too, which in Keras goes on.

    Args:
        learning_rate: a float, a `LearningRateSchedule` (of apply calls, as Keras counts them), or
            a callable without arguments.
        beta_1, beta_2, epsilon: as `keras.optimizers.Nadam` and `Adam` have them.
        weight_decay: decoupled, but of what `exclude_from_weight_decay` excludes; None: none.
        clipnorm, clipvalue, global_clipnorm: clip the mean gradient of all ranks.
        use_ema, ema_momentum, ema_overwrite_frequency: the average is kept on the shards; it and
            its frequency follow steps, not micro-batches.
        loss_scale_factor: a fixed scale of the loss.
        loss_scale: a scale of the loss that the shards keep and all ranks have: where one
            overflows, all skip the step and the scale backs off. Compile the model with
            `auto_scale_loss=False`, and on JAX with `run_eagerly=True`. It is not in `.keras`
            files, nor in what `restore` takes from a checkpoint: it begins anew.
        gradient_accumulation_steps: micro-batches whose mean each rank pushes.
        name: Keras's name of this object.
        num_shards, replicas, backend, options: as `distnadam.DistNadam` has them.
        num_workers, rank: how many processes train, and which this is; None finds it, from Ray
            Train, or from the variables that torchrun sets.
        cluster_name: `distnadam.DistNadam`'s name, by which ranks find each other; None is made
            from what started them.

    Raises:
        ConfigError: an argument of ours is out of its range, or Keras has another backend than
            torch or JAX.
        ValueError: an argument of Keras's is.
    """

    _FORMULA: ClassVar[Formula] = "nadam"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        num_shards: int = 1,
        num_workers: int | None = None,
        rank: int | None = None,
        replicas: int = 0,
        backend: BackendName = "auto",
        cluster_name: str | None = None,
        loss_scale: LossScale | Mapping[str, Any] | None = None,
        options: Options | Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if keras.backend.backend() not in ("torch", "jax"):
            raise ConfigError(
                f"KERAS_BACKEND={keras.backend.backend()!r}: expected 'torch' or 'jax'; with "
                "TensorFlow use distnadam.tf_keras"
            )
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **others,
        )
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.num_shards, self.replicas = num_shards, replicas
        self.backend, self.cluster_name = backend, cluster_name
        self.options = Options.of(options)
        self.loss_scale = None if loss_scale is None else LossScale.of(loss_scale)
        if loss_scale is not None and loss_scale_factor is not None:
            raise ConfigError("loss_scale and loss_scale_factor would both scale: give one of them")
        self._scaled_by = 1.0  # what the loss of the coming step was multiplied by
        self._names: tuple[str, ...] = ()
        self._pending: Any = None
        self._last_iteration = -1
        self._calls: Any = None  # to the host, of what JAX has compiled
        self._asked = {"num_workers": num_workers, "rank": rank}
        self._replica = Replica(self._arguments(), rank, num_workers)

    def _arguments(self) -> dict[str, Any]:
        """Return `distnadam.DistNadam`'s arguments."""
        # Keras has them in place of None where they have no effect
        clips = {n: getattr(self, n) or None for n in ("clipnorm", "clipvalue", "global_clipnorm")}
        average = ("use_ema", "ema_momentum", "ema_overwrite_frequency")
        decay = 1.0 if self._FORMULA == "nadam" else DEFAULT_SCHEDULE_DECAY
        return {
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "formula": self._FORMULA,
            "clocks": "tensor",
            "schedule_decay": decay,
            "weight_decay": self.weight_decay or 0.0,
            **clips,
            **({name: getattr(self, name) for name in average} if self.use_ema else {}),
            "num_shards": self.num_shards,
            "replicas": self.replicas,
            "backend": self.backend,
            "name": self.cluster_name,
            "options": self.options,
            "loss_scale": self.loss_scale,
        }

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._replica.rank

    @property
    def num_workers(self) -> int:
        """How many ranks there are."""
        return self._replica.num_workers

    @property
    def loss_scale_factor(self) -> float | None:
        """The fixed scale of the loss.

        Raises:
            ConfigError: a LossScaleOptimizer takes the scaling over, with several workers or a
                `loss_scale`.
        """
        return self.__dict__.get("_scale")

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: float | None) -> None:
        if value is None and "_replica" in self.__dict__:
            refuse_wrapper(self.num_workers, is_scaled=self.loss_scale is not None)
        self.__dict__["_scale"] = value

    @override
    def scale_loss(self, loss: Any) -> Any:
        """Return the loss times its scale, that of the coming step where the shards keep it."""
        if self.loss_scale is None:
            return super().scale_loss(loss)
        replica = self._replica
        self._scaled_by = replica.loss_scale if replica.is_started else self.loss_scale.first.scale
        return scaled(loss, self._scaled_by)

    @override
    def build(self, variables: Sequence[Any]) -> None:
        """Prepare for the trainable variables of a model; the shards start at the first step."""
        if self.built:
            return
        self.use_ema = False  # of Keras's own: the average is on the shards
        try:
            super().build(list(variables))
        finally:
            self.use_ema = self._replica.use_ema
        self._names = tuple(distinct([getattr(v, "path", v.name) for v in self.stepped_variables]))
        if self._pending is not None:
            self._take(self._pending)
            self._pending = None

    @override
    def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
        given = {id(v): g for v, g in zip(trainable_variables, grads, strict=True)}
        count = self.gradient_accumulation_steps
        if not count:
            self._step(given)
            return
        accumulators = [
            self._accumulated_gradients[self._get_variable_index(v)] for v in trainable_variables
        ]
        sums = [given[id(v)] + s for v, s in zip(trainable_variables, accumulators, strict=True)]
        is_last = (self._iterations + 1) % count == 0
        means = {id(v): s / count for v, s in zip(trainable_variables, sums, strict=True)}
        if is_traced(is_last):
            self._step(means, where=is_last)
        elif bool(is_last):
            self._step(means)
        for accumulator, total in zip(accumulators, sums, strict=True):
            accumulator.assign(keras.ops.where(is_last, keras.ops.zeros_like(total), total))

    def _step(self, given: Mapping[int, Any], where: Any = None) -> None:
        """Step by gradients by variable; traced by JAX, only `where` that is true at run time."""
        variables = self.stepped_variables
        values = [v.value for v in variables]
        gradients = [given.get(id(v)) for v in variables]
        rate, count = keras.ops.convert_to_tensor(self.learning_rate), self._iterations.value
        if any(map(is_traced, [*values, *gradients, rate, count])):
            from distnadam.keras.traced import HostCalls, stepped

            if self.loss_scale is not None:
                refuse_compiled()
            self._calls = self._calls or HostCalls()
            new = stepped(self._calls, self._on_host, count, rate, values, gradients, where)
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
        else:
            self._on_host(count, rate, values, gradients, variables)

    def _on_host(
        self, count: Any, rate: Any, values: Any, gradients: Any, assigned: Sequence[Any] = ()
    ) -> list[Array]:
        """Push this rank's gradients; assign and return the new parameters, views of a round."""
        iteration, lr = int(as_numpy(count)), float(as_numpy(rate))
        if iteration <= self._last_iteration:
            raise StructureError(
                f"{self.name}: the update of apply call {self._last_iteration + 1} was computed "
                "and thrown away, and the shards have stepped: apply each update once, in order; "
                "to sum micro-batches use gradient_accumulation_steps"
            )
        replica = self._replica
        params = dict(zip(self._names, map(as_numpy, values), strict=True))
        if not replica.is_started:
            replica.start(params, groups=self._groups(), lr=lr)
        pushed = dict(zip(self._names, self._scaled(gradients), strict=True))
        new: list[Array] = []

        def take(params: Mapping[str, Array]) -> None:
            new[:] = [np.asarray(params[name]) for name in self._names]
            for variable, array in zip(assigned, new, strict=False):
                assign(variable, array)

        replica.step(params, pushed, take, lr=lr)
        self._last_iteration, self._scaled_by = iteration, 1.0
        return new

    def _scaled(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """Return gradients of losses times the shards' scale, which this rank did not know before
        its first step, nor does a loop that does not call `scale_loss`.
        """
        if self.loss_scale is None:
            return gradients
        return rescaled(gradients, self._scaled_by, self._replica.loss_scale)

    def _groups(self) -> list[Group]:
        if not self.weight_decay:
            return []
        pairs = zip(self._names, self.stepped_variables, strict=True)
        return [Group(n, weight_decay=0.0) for n, v in pairs if not self._use_weight_decay(v)]

    @override
    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Have the variables be their average, if one is kept, as Keras does after `fit`."""
        if self.use_ema and self._replica.is_started:
            self._settle()
            ema = self._replica.optimizer.get_ema_params()
            wanted = {id(v) for v in var_list}
            for name, variable in zip(self._names, self.stepped_variables, strict=True):
                if id(variable) in wanted:
                    assign(variable, np.asarray(ema[name], as_numpy(variable.value).dtype))

    @property
    def cluster(self) -> Any:
        """The `distnadam.DistNadam` whose shards hold the state; there is one from the first step
        on.
        """
        self._settle()
        return self._replica.optimizer

    def close(self) -> None:
        """Leave the cluster, and end it if this rank made it."""
        try:
            if self._calls is not None:
                self._calls.wait()
        finally:
            self._replica.close()

    def slots(self) -> Slots:
        """Return copies of what the shards hold beside the parameters, by `names`."""
        self._settle()
        variables = self.stepped_variables
        still = [np.zeros(variable.shape, np.float32) for variable in variables]
        if self._replica.is_started or not self.use_ema:
            return self._replica.slots(dict(zip(self._names, still, strict=True)))
        return self._replica.slots(dict(zip(self._names, map(numpy_of, variables), strict=True)))

    def load_slots(self, slots: Slots) -> None:
        """Have the shards go on from other slots."""
        self._replica.load(slots)
        count = slots.iterations * (self.gradient_accumulation_steps or 1)
        self._iterations.assign(count)
        self._last_iteration = count - 1

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names on the shards, in the order of the variables they stand for."""
        return self._names

    @property
    def stepped_variables(self) -> list[Any]:
        """What the shards step, in the order of `names`: all but what Keras itself overwrites."""
        return [
            v for v in self._trainable_variables if not self._overwrite_variable_with_gradient(v)
        ]

    @override
    def save_own_variables(self, store: Any) -> None:
        """Store what keras.optimizers' class of this formula would, with the shards' moments."""
        own = [numpy_of(v) for v in self.variables]
        if self.built:
            scalars = len(own) - len(self._accumulators())
            listed = arrays_of(self.slots(), self._names, has_product=self._FORMULA == "nadam")
            count = self.gradient_accumulation_steps or 1
            own[0] = np.array(listed.iterations * count + int(own[0]) % count, own[0].dtype)
            own = [*own[:scalars], *listed.ema, *own[scalars:], *listed.slots, *listed.clocks]
        for index, array in enumerate(own):
            store[str(index)] = array

    @override
    def load_own_variables(self, store: Any) -> None:
        """Take what `save_own_variables` stored, here or in Keras's class of this formula.

        Raises:
            StructureError: it is of another model, or of other settings.
        """
        arrays = [np.array(store[str(index)]) for index in range(len(store.keys()))]
        if self.built:
            self._take(arrays)
        elif len(arrays) == len(self.variables):  # it was not built either
            for variable, array in zip(self.variables, arrays, strict=True):
                variable.assign(array)
        else:
            self._pending = np.empty(len(arrays), object)  # Keras looks into lists
            self._pending[:] = arrays

    def _accumulators(self) -> list[Any]:
        return list(self._accumulated_gradients) if self.gradient_accumulation_steps else []

    def _take(self, arrays: Sequence[Array]) -> None:
        own, sums = self.variables, self._accumulators()
        scalars = len(own) - len(sums)
        if len(arrays) == scalars:  # it was saved before it was built: there is nothing else
            for variable, array in zip(own, arrays, strict=False):
                variable.assign(array)
            return
        shapes = [tuple(v.shape) for v in self.stepped_variables]
        rest, slots = slots_of(
            arrays,
            dict(zip(self._names, shapes, strict=True)),
            scalars=scalars,
            sums=len(sums),
            has_product=self._FORMULA == "nadam",
            use_ema=self.use_ema,
            per_step=self.gradient_accumulation_steps or 1,
        )
        self._replica.load(slots)
        for variable, array in zip(own, rest, strict=True):
            variable.assign(array)
        self._last_iteration = int(rest[0]) - 1

    def _settle(self) -> None:
        """Wait for steps that JAX has been told of and has not taken; raise what refused one."""
        if self._calls is not None:
            self._calls.settle()

    @override
    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        ours = {name: getattr(self, name) for name in _OURS} | dict(self._asked)
        ours["options"] = self.options.to_dict()
        ours["loss_scale"] = None if self.loss_scale is None else self.loss_scale.to_dict()
        formula = {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}
        return {**super().get_config(), **formula, **ours}
