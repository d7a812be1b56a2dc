"""One optimizer's state as frameworks exchange it, to and from a checkpoint.

It is named tensors with two moments each, one clock and one config. This module knows layouts and
checkpoints, no framework; what cannot be a state is refused here, naming the file and the tensor.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distnadam.checkpoint import store
from distnadam.checkpoint.contents import check_layout
from distnadam.checkpoint.manifest import Manifest, Position
from distnadam.checkpoint.shard_file import read_shard, write_shard
from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.config import Settings
from distnadam.errors import CheckpointError, ConfigError, StructureError
from distnadam.groups import groups_of
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock, TensorClocks, each_setting
from distnadam.schedules import rate_at
from distnadam.tensors.arrays import NAME_OF, STATE_ARRAYS, Array, Flat, empty_flat, own_errors
from distnadam.tensors.layout import Layout
from distnadam.tensors.leaves import as_numpy, first_of


@dataclass(frozen=True)
class OptimizerState:
    """Everything that decides how training goes on, apart from the gradients.

    Args:
        layout: the tensors' paths, shapes, dtypes and tree.
        config: the hyper-parameters.
        clock: steps applied, and the product of the momentum coefficients so far.
        params: the master copies, one array per tensor in the layout's order, each in its space's
            dtype (float32 or float64).
        m: the first moments, likewise.
        v: the second moments, likewise.
        ema: the average of the parameters, likewise; None if `config` keeps none.

    >>> with DistNadam(lr=0.1, backend="local").build({"w": np.ones(2, np.float32)}) as optimizer:
    ...     state = load_checkpoint(optimizer.save("runs/state"))
    >>> state.names, state.params, state.rate
    (['w'], [array([1., 1.], dtype=float32)], 0.1)
    """

    layout: Layout
    config: NadamConfig
    clock: Clock
    params: Sequence[Array]
    m: Sequence[Array]
    v: Sequence[Array]
    ema: Sequence[Array] | None = None

    @property
    def names(self) -> list[str]:
        """The tensors' paths in the layout's order."""
        return [tensor.path for tensor in self.layout.tensors]

    @property
    def half(self) -> list[str]:
        """The paths of the tensors in half precision; their masters and moments are float32."""
        return [tensor.path for tensor in self.layout.tensors if tensor.dtype != tensor.space]

    @property
    def fewest_steps(self) -> int:
        """The steps of the trained tensor that has fewest."""
        return min((self.clock.of_tensor(i).steps for i in self.trained(None)), default=0)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return rate_at(self.config.lr, self.clock.iterations)

    @cached_property
    def groups(self) -> list[int]:
        """The index of each tensor's group, or -1."""
        return groups_of(self.config.groups, self.names)

    @cached_property
    def frozen(self) -> list[str]:
        """The paths of the tensors that no step changes."""
        return frozen_by(self.config, self.names)

    @cached_property
    def settings(self) -> list[tuple[float, NadamConfig]]:
        """The learning rate of the next step and the other settings of each tensor."""
        found = list(each_setting(self.rate, self.clock, self.config))
        return [found[number + 1] for number in self.groups]

    @cached_property
    def weight_decay(self) -> float:
        """The weight decay of the tensors that are trained and decay; where groups differ, that of
        the optimizer if it is among theirs.
        """
        found = {self.settings[i][1].weight_decay for i in self.trained(None)}
        base = self.config.weight_decay
        return base if base and base in found else max(found, default=0.0)

    def positions(self, order: Sequence[str] | None) -> list[int]:
        """Return each tensor's index in the layout, in another framework's order; None: the order
        in which `build` was given them.

        Raises:
            StructureError: `order` does not name every tensor once; frozen ones may be left out.
        """
        if order is None:
            return self.layout.given_order
        return positions(self.names, order, optional=self.frozen)

    def trained(self, order: Sequence[str] | None) -> list[int]:
        """Return `positions` without the frozen tensors."""
        frozen = set(self.frozen)
        return [i for i in self.positions(order) if self.names[i] not in frozen]

    def save(self, root: DirectoryLike) -> str:
        """Write a checkpoint of one shard under `root`, and return its directory."""
        check_layout(self.layout)
        ranges = {space: (0, size) for space, size in self.layout.sizes.items()}
        slots = self.config.state_arrays
        arrays = {slot: _flat(self.layout, getattr(self, slot)) for slot in slots}
        position = Position(clock=self.clock, round=self.clock.iterations)
        manifest = Manifest.of(Settings(config=self.config), self.layout, position, data={})
        with store.new_checkpoint(root, manifest) as checkpoint:
            directory = checkpoint.directory
            if store.MANIFEST in directory.files():
                raise CheckpointError(
                    f"{directory}: is a checkpoint already; import into another directory"
                )
            name = checkpoint.file_name(0, 1)
            checkpoint.commit([write_shard(directory, name, ranges=ranges, state=arrays)])
        return directory.place


def load_checkpoint(path: DirectoryLike) -> OptimizerState:
    """Return the state of a checkpoint, or of the newest valid one in a directory, verified.

    Raises:
        CheckpointError: naming the file that was refused, and why.
        ConfigError: its learning rate is a schedule of the user's that was not imported.

    >>> with DistNadam(backend="local").build({"w": np.ones(2, np.float32)}) as optimizer:
    ...     load_checkpoint(optimizer.save("runs/loaded")).clock.iterations
    0
    """
    directory, manifest, _ = store.find(path)
    layout = Layout.from_dict(manifest.layout)
    whole = {space: (0, size) for space, size in layout.sizes.items()}
    flat = read_shard(directory, manifest, ranges=whole, leftovers=range(len(manifest.files)))
    return OptimizerState(
        layout,
        NadamConfig.from_dict(manifest.config),
        manifest.clock,
        **{slot: layout.views(arrays) for slot, arrays in flat.items()},
    )


def make_state(
    where: str,
    layout: Layout,
    config: NadamConfig,
    clock: tuple[Any, Any],
    slots: Mapping[str, Mapping[str, Any]],
    tensors: TensorClocks | None = None,
) -> OptimizerState:
    """Return the state of named arrays, every one checked.

    Args:
        where: begins every message: the file, or what the arrays came from.
        layout: the tensors there must be.
        config: the hyper-parameters.
        clock: the steps applied and the product of the momentum coefficients, numbers or 0-d
            arrays, not yet checked.
        slots: "params", "m", "v" and "ema", each a mapping of path to array; "m" and "v" may both
            be left out (all zero), and so may "ema" (the parameters); but for "params", they may
            hold nothing of frozen tensors.
        tensors: the clocks of the tensors, in the layout's order, where they have others.

    Raises:
        CheckpointError: naming the tensor, the expected and the given.
    """
    iterations, m_schedule = (
        _number(where, name, value)
        for name, value in zip(("step", "m_schedule"), clock, strict=True)
    )
    if not 0 <= iterations < 2**53 or iterations != int(iterations):
        raise CheckpointError(
            f"{where}: step: expected a whole number of at least 0, got {iterations!r}"
        )
    if not 0.0 <= m_schedule <= 1.0:
        raise CheckpointError(
            f"{where}: m_schedule: expected a product of momentum coefficients, in [0, 1], got "
            f"{m_schedule!r}"
        )
    if tensors is not None and len(tensors.index) != len(layout.tensors):
        raise CheckpointError(
            f"{where}: clocks: expected those of {len(layout.tensors)} tensors, got those of "
            f"{len(tensors.index)}"
        )
    try:
        frozen = frozen_by(config, [tensor.path for tensor in layout.tensors])
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    checked = {
        slot: _slot(where, layout, slot, slots.get(slot), () if slot == "params" else frozen)
        for slot in STATE_ARRAYS
    }
    if config.use_ema:
        average = dict(slots.get("ema", slots["params"]))
        average |= {path: slots["params"][path] for path in frozen if path not in average}
        checked["ema"] = _slot(where, layout, "ema", average, ())
    return OptimizerState(layout, config, Clock(int(iterations), m_schedule, tensors), **checked)


def make_config(where: str, values: Mapping[str, Any]) -> NadamConfig:
    """Return the hyper-parameters of plain values in our own spelling.

    Raises:
        CheckpointError: naming the one that is refused.
    """
    try:
        return NadamConfig.from_dict({"lr": 0.002, **values})
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its hyper-parameters are refused: {error}") from error


def frozen_by(config: NadamConfig, names: Sequence[str]) -> list[str]:
    """Return the names of the tensors that the config's groups freeze.

    Raises:
        ConfigError: a group has no tensor.
    """
    found = zip(names, groups_of(config.groups, names), strict=True)
    return [name for name, i in found if i >= 0 and not config.groups[i].trainable]


def layout_of(where: str, params: Mapping[str, Any]) -> Layout:
    """Return the layout of a flat mapping of names to arrays.

    Raises:
        CheckpointError: naming the one that cannot be a parameter.
    """
    try:
        return Layout.of(dict(params))
    except StructureError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_array(where: str, value: Any) -> Array:
    """Return the numbers of an array of any framework, or raise CheckpointError."""
    try:
        return as_numpy(value)
    except StructureError as error:
        raise CheckpointError(f"{where}: {error}") from error.__cause__


def read_layout(where: str, data: Any) -> Layout:
    """Return the layout of plain data, or raise CheckpointError."""
    try:
        return Layout.from_dict(data)
    except (
        StructureError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"{where}: its layout is refused: {type(error).__name__}: {error}"
        ) from error


def positions(
    names: Sequence[str], order: Sequence[str] | None, *, optional: Collection[str] = ()
) -> list[int]:
    """Return the index in `names` of each name of `order`; None: the order of `names`.

    Those of `optional` that `order` lacks follow it.

    Raises:
        StructureError: `order` does not hold each name once.
    """
    if order is None:
        return list(range(len(names)))
    index = {name: i for i, name in enumerate(names)}
    order = [*order, *(name for name in optional if name not in order)]
    wrong = [name for name in order if name not in index] or sorted(set(names) - set(order))
    if wrong or len(order) != len(names):
        instead = f", not {wrong[0]!r}" if wrong else ""
        raise StructureError(
            f"order: expected each of the {len(names)} tensors once{instead};"
            f" got {len(order)} names"
        )
    return [index[name] for name in order]


def _slot(
    where: str,
    layout: Layout,
    slot: str,
    given: Mapping[str, Any] | None,
    optional: Collection[str],
) -> list[Array]:
    views = layout.views({space: np.zeros(size, space) for space, size in layout.sizes.items()})
    if given is None:
        return views
    missing = [
        tensor.path
        for tensor in layout.tensors
        if tensor.path not in given and tensor.path not in optional
    ]
    extra = sorted(set(given) - {tensor.path for tensor in layout.tensors})
    if missing or extra:
        problem = (
            f"tensor {missing[0]!r} is missing"
            if missing
            else f"{extra[0]!r} is not a tensor of the model"
        )
        raise CheckpointError(
            f"{where}: {slot}: {problem}; expected {len(layout.tensors)} tensors, got {len(given)}"
        )
    for tensor, view in zip(layout.tensors, views, strict=True):
        if tensor.path not in given:
            continue
        what = f"{where}: {slot} of {tensor.path!r}"
        array = read_array(what, given[tensor.path])
        if array.shape != tensor.shape:
            raise CheckpointError(f"{what}: expected shape {tensor.shape}, got shape {array.shape}")
        if array.dtype not in NAME_OF:
            raise CheckpointError(
                f"{what}: expected floating-point numbers for {tensor.dtype}, got {array.dtype}"
            )
        with own_errors():
            np.copyto(view, array, casting="unsafe")
        if not np.isfinite(view).all():
            raise CheckpointError(
                f"{what}: expected finite {tensor.space} values, got "
                f"{first_of(array, ~np.isfinite(view))}"
            )
        if slot == "v" and (view < 0).any():
            raise CheckpointError(
                f"{what}: a second moment must be at least 0, got {first_of(array, view < 0)}"
            )
    return views


def _number(where: str, name: str, value: Any) -> float:
    array = (
        np.asarray(float(value))
        if isinstance(value, int)
        else read_array(f"{where}: {name}", value)
    )
    if array.shape != () or array.dtype.kind not in "fiu" or not np.isfinite(array):
        raise CheckpointError(
            f"{where}: {name}: expected one finite number, got shape {array.shape} and dtype "
            f"{array.dtype}"
        )
    return float(array)


def _flat(layout: Layout, arrays: Sequence[Array]) -> Flat:
    flat = empty_flat(layout.sizes)
    for view, array in zip(layout.views(flat), arrays, strict=True):
        np.copyto(view, array)
    return flat
