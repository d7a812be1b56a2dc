"""JAX: optimizers over pytrees, with optax's arguments and defaults, whose state is on shards.

    optimizer = distnadam.jax.DistNadamW(1e-3, weight_decay=1e-4)
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(params, batch)
    params = optimizer.step(params, grads)

`step` is called outside of `jax.jit`, and returns the very numbers that the shards hold. For who
needs an optax transformation there is `optimizer.transformation()`. Its update is a difference, and
p + (q - p) is not always q: after an Adam step without weight decay it nearly always is, else up to
a unit in the last place off, in the client alone; the shards keep q, and errors do not add up.

>>> import jax.numpy as jnp
>>> optimizer = DistNadam(0.1, backend="local")
>>> params = optimizer.step({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
>>> [round(float(w), 4) for w in params["w"]]
[0.8526, 0.8526]
>>> optimizer.close()
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distnadam.config import BackendName, Options
from distnadam.errors import ConfigError, StructureError
from distnadam.frontends.changes import differing
from distnadam.frontends.host_calls import HostCalls
from distnadam.frontends.replica import Named, Replica, distinct
from distnadam.groups import Group
from distnadam.hyperparameters import Formula
from distnadam.tensors.arrays import Array
from distnadam.tensors.leaves import as_numpy

__all__ = ["DistAdam", "DistAdamW", "DistNadam", "DistNadamW", "UpdateState"]

_Take = Callable[[list[Array]], None]
Mask = Any
"""A tree of bools like the parameters', or a function from these to one."""


class UpdateState(NamedTuple):
    """The state of a transformation: how many updates were made; the rest is on the shards.

    >>> int(DistNadam(0.1, backend="local").transformation().init({"w": jnp.ones(2)}).count)
    0
    """

    count: Any


class DistNadam:
    """Nadam as optax.nadam computes it, on shards.

    Args:
        learning_rate: a float, or a function of the number of steps, as optax's schedules are.
        b1, b2, eps: decays of the moments, and what is added to the root of the second.
        weight_decay: decoupled.
        mask: which parameters decay, as optax.nadamw has it; None: all.
        clipnorm, clipvalue, global_clipnorm: clip the mean gradient of all ranks.
        num_shards, replicas, backend, options: as `distnadam.DistNadam` has them.
        num_workers, rank: how many processes train, and which this is; None finds it, from Ray
            Train, or from the variables that torchrun sets.
        name: `distnadam.DistNadam`'s, by which ranks find each other; None is made from what
            started them.
        others: further arguments of `distnadam.DistNadam`.

    Raises:
        ConfigError: naming the argument and its value.

    >>> params = DistNadam(0.1, backend="local").step({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    >>> [round(float(w), 4) for w in params["w"]]
    [0.8526, 0.8526]
    """

    _FORMULA: ClassVar[Formula] = "nadam_optax"

    def __init__(
        self,
        learning_rate: float | Callable[[Any], Any],
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        mask: Mask = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        num_shards: int = 1,
        num_workers: int | None = None,
        rank: int | None = None,
        replicas: int = 0,
        backend: BackendName = "auto",
        name: str | None = None,
        options: Options | Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        arguments = {
            "beta_1": b1,
            "beta_2": b2,
            "epsilon": eps,
            "weight_decay": weight_decay,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "num_shards": num_shards,
            "replicas": replicas,
            "backend": backend,
            "name": name,
            "options": options,
            "formula": self._FORMULA,
            **others,
        }
        self._rate = learning_rate if callable(learning_rate) else None
        if not callable(learning_rate):
            arguments["lr"] = learning_rate
        self._replica = Replica(arguments, rank, num_workers)
        self._calls = HostCalls()
        self._decays = weight_decay != 0.0
        self._mask = mask
        self._names: list[str] = []
        self._structure: Any = None
        self._expected: list[Array] | None = None
        self._count = 0

    def step(self, params: Any, grads: Any) -> Any:
        """Push this rank's gradients, wait for the round, and return the new parameters.

        Args:
            params: a pytree of arrays; what was changed since the last step is taken over. After
                `Rewound`, a Ctrl-C or a timeout those of before are no change: the shards go on
                from their own, which `cluster.get_params()` returns by name.
            grads: a pytree of the same structure.

        Returns:
            A pytree of the same structure, of arrays on the devices of `params`; one copy of what
            the shards wrote.

        Raises:
            StructureError: `grads` or `params` has not the structure of the first `params`.
            ConfigError: it is called under `jax.jit` or another transformation of JAX.
            And as `distnadam.Worker.step`.
        """
        leaves = jax.tree.leaves(params)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in [*leaves, *jax.tree.leaves(grads)]):
            raise ConfigError(
                "step is for the host, and was called under jax.jit or grad: jit the gradients "
                "alone, and step with what they are; or use transformation()"
            )
        self._expected = None
        new: list[Any] = []

        def take(arrays: list[Array]) -> None:
            new[:] = map(_on_device_of, leaves, arrays)

        self._step(self._listed(params, "params"), self._listed(grads, "grads"), take)
        return jax.tree.unflatten(self._structure, new)

    def transformation(self) -> Any:
        """Return an optax.GradientTransformation whose update steps the shards.

        Works under `jax.jit`, where the update is a callback to the host. What that refuses JAX
        raises as an error of its own, where the step is called or where its results are first
        looked at; the parameters and the state of before may then be stepped again. If it has not
        by then, the next `cluster` raises our own error, once.

        The client's parameters must be those that the last update led to, since a difference is of
        them: others are refused, as where a schedule or a mask scales the update afterwards, or an
        update was thrown away (optax.MultiSteps, optax.apply_if_finite, a branch of lax.cond that
        computes both). Half precision is refused, whose differences lose what a step is.
        """
        import optax

        return optax.GradientTransformation(self._init, self._update)

    @property
    def cluster(self) -> Any:
        """The `distnadam.DistNadam` whose shards hold the state, from the first step on: to save,
        to reshard, to read the moments.
        """
        self._calls.settle()
        return self._replica.optimizer

    def close(self) -> None:
        """Leave the cluster, and end it if this rank made it."""
        try:
            self._calls.wait()  # what it has refused, the results say that nobody has looked at
        finally:
            self._replica.close()

    def _init(self, params: Any) -> UpdateState:
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            if jnp.asarray(leaf).dtype.itemsize < 4:
                raise ConfigError(
                    f"{jax.tree_util.keystr(path)}: {leaf.dtype}: a difference of parameters in "
                    "half precision is not what the shards stepped by: use step(params, grads)"
                )
        return UpdateState(jnp.zeros((), jnp.int32))

    def _update(
        self, updates: Any, state: UpdateState, params: Any = None, **_: Any
    ) -> tuple[Any, UpdateState]:
        if params is None:
            raise ConfigError("update(grads, state, params) needs params: the step depends on them")
        values, grads = self._listed(params, "params"), self._listed(updates, "grads")
        if any(isinstance(leaf, jax.core.Tracer) for leaf in [*values, *grads, state.count]):
            differences = self._calls.traced(self._difference, values, state.count, values, grads)
        else:
            differences = [jnp.array(d) for d in self._difference(state.count, values, grads)]
        return jax.tree.unflatten(self._structure, differences), UpdateState(state.count + 1)

    def _difference(self, count: Any, values: Sequence[Any], grads: Sequence[Any]) -> list[Array]:
        """Step, and return what leads from the client's parameters to the shards'."""
        arrays = [as_numpy(value) for value in values]
        if int(as_numpy(count)) != self._count:
            raise StructureError(
                f"update {int(as_numpy(count)) + 1} follows update {self._count}: one was computed "
                "and thrown away, or made twice, and the shards have stepped; to sum micro-batches "
                "average the gradients before they come here"
            )
        differences: list[Array] = []

        def take(new: list[Array]) -> None:
            differences[:] = [q - p for p, q in zip(arrays, new, strict=True)]

        if self._expected is not None:
            expected, given = (
                dict(zip(self._names, each, strict=True)) for each in (self._expected, arrays)
            )
            if odd := differing(expected, given):
                raise StructureError(
                    f"{odd[0]}: the client's parameters are not those that the last update led "
                    "to: apply updates as they are, or use step(params, grads)"
                )
            held = self._replica.handed_out()
            self._stepped([np.asarray(held[name]) for name in self._names], grads, take)
        else:
            self._step(arrays, grads, take)
        self._expected = [p + d for p, d in zip(arrays, differences, strict=True)]
        self._count += 1
        return differences

    def _step(self, values: Sequence[Any], grads: Sequence[Any], take: _Take) -> None:
        params = [as_numpy(value) for value in values]
        if not self._replica.is_started:
            named = dict(zip(self._names, params, strict=True))
            self._replica.start(named, groups=self._groups())
        self._stepped(params, grads, take)

    def _stepped(self, params: Sequence[Array], grads: Sequence[Any], take: _Take) -> None:
        rate = None
        if self._rate is not None:
            rate = float(self._rate(self._replica.optimizer.iterations))
        named, pushed = (dict(zip(self._names, each, strict=True)) for each in (params, grads))

        def taken(new: Named) -> None:
            take([np.asarray(new[name]) for name in self._names])

        self._replica.step(named, pushed, taken, lr=rate)

    def _listed(self, tree: Any, what: str) -> list[Any]:
        """Return a tree's leaves; the first gives their names and the structure."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        if self._structure is None:
            plain = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
            self._names = distinct([name or "params" for name in plain])
            self._structure = structure
            mask = self._mask(tree) if callable(self._mask) else self._mask
            self._mask = None if mask is None else jax.tree.broadcast(mask, tree)
        if structure != self._structure:
            raise StructureError(f"{what}: expected {self._structure}, got {structure}")
        return [leaf for _, leaf in paths]

    def _groups(self) -> list[Group]:
        if self._mask is None or not self._decays:
            return []
        marks = jax.tree.leaves(self._mask)
        pairs = zip(self._names, marks, strict=True)
        return [Group(name, weight_decay=0.0) for name, decays in pairs if not decays]


class DistNadamW(DistNadam):
    """Nadam with decoupled weight decay, 1e-4 as optax.nadamw has it.

    >>> optimizer = DistNadamW(0.1, weight_decay=0.5, backend="local")
    >>> params = optimizer.step({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    >>> [round(float(w), 4) for w in params["w"]]
    [0.8026, 0.8026]
    """

    def __init__(
        self,
        learning_rate: float | Callable[[Any], Any],
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        *,
        weight_decay: float = 1e-4,
        **others: Any,
    ) -> None:
        super().__init__(learning_rate, b1, b2, eps, weight_decay=weight_decay, **others)


class DistAdam(DistNadam):
    """Adam as optax.adam computes it.

    >>> params = DistAdam(0.1, backend="local").step({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    >>> [round(float(w), 4) for w in params["w"]]
    [0.9, 0.9]
    """

    _FORMULA: ClassVar[Formula] = "adam"


class DistAdamW(DistNadamW):
    """Adam with decoupled weight decay, 1e-4 as optax.adamw has it.

    >>> optimizer = DistAdamW(0.1, weight_decay=0.5, backend="local")
    >>> params = optimizer.step({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    >>> [round(float(w), 4) for w in params["w"]]
    [0.85, 0.85]
    """

    _FORMULA: ClassVar[Formula] = "adam"


def _on_device_of(leaf: Any, array: Array) -> Any:
    """Return a copy where a leaf is; the shards overwrite the array."""
    if not isinstance(leaf, jax.Array):
        return jnp.array(array, copy=True)
    if all(device.platform == "cpu" for device in leaf.devices()):
        return jax.device_put(np.array(array), leaf.sharding)  # which keeps the memory it is given
    return jax.device_put(array, leaf.sharding).block_until_ready()
