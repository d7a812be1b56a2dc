"""What an optimizer holds, as its user reads and replaces it between two rounds: the parameters,
their average, Keras's list of weights; and where its shards and ranks stand.
"""

from collections.abc import Iterable
from typing import Any

from distnadam.client.fixed_attributes import FixedAttributes
from distnadam.client.lifecycle import Lifecycle
from distnadam.client.user_state import from_weights, params_from, to_weights
from distnadam.config import Options
from distnadam.errors import ConfigError
from distnadam.tensors.arrays import Array


class HeldState(FixedAttributes):
    """The methods of an optimizer that read where it stands, and that read and replace its arrays,
    of all shards at one round.
    """

    _life: Lifecycle

    @property
    def iterations(self) -> int:
        """Steps applied so far."""
        return self._life.shards.describe().iterations if self._life.is_built else 0

    @property
    def round(self) -> int:
        """Rounds decided so far: applied, skipped or refused; batches follow it."""
        return self._life.shards.describe().round if self._life.is_built else 0

    @property
    def skipped(self) -> int:
        """Rounds that ended with no step, for a gradient that was not finite, or a rank's vote."""
        return self._life.shards.describe().skipped if self._life.is_built else 0

    @property
    def loss_scale(self) -> float:
        """What losses are to be multiplied by for the next round; 1 if `loss_scale` is None.

        >>> scale = LossScale(init_scale=8.0)
        >>> with DistNadam(loss_scale=scale, backend="local").build(np.ones(2)) as optimizer:
        ...     optimizer.loss_scale, optimizer.worker(0).loss_scale, optimizer.worker(0).is_scaled
        (8.0, 8.0, True)
        """
        return (self._life.shards.describe().loss_scale if self._life.is_built else 0.0) or 1.0

    @property
    def backend_name(self) -> str:
        """ "local" or "ray", once built."""
        return self._life.shards.backend.name

    @property
    def options(self) -> Options:
        """The rare settings it was made with."""
        return self._life.settings.options

    def waiting_for(self) -> tuple[int, ...]:
        """Return the ranks that have not pushed for the coming round."""
        return self._life.shards.describe().waiting_for

    def lost_ranks(self) -> dict[int, int]:
        """Return the dead worker's incarnation for each rank that has no new worker yet."""
        return self._life.shards.backend.supervisor.lost_ranks()

    def get_params(self) -> Any:
        """Return a copy of the parameters in the structure given to `build`, each in its own dtype.

        They are never rounded to `pull_dtype`. A tensor of shape () is a NumPy scalar.

        Raises:
            Rewound: a shard died and all went back to round `error.step` since this handle last
                looked; every method that reads, writes or steps the whole raises it once.
        """
        return self._read_tree("params")

    def set_params(self, params: Any) -> None:
        """Replace the parameters; moments, clock and average stay. Open pushes are refused
        (StaleEpoch).

        Raises:
            StructureError: naming the tensor that does not fit; nothing was changed.
        """
        self._write_tree("params", params, "params")

    def get_ema_params(self) -> Any:
        """Return a copy of the average of the parameters that `use_ema` keeps, as `get_params` does
        of the parameters.

        It is the parameters given to `build` until the first step, and becomes those that this
        leads to; each later step makes it
        ``ema_momentum * average + (1 - ema_momentum) * parameters``. A round without a step leaves
        it, and so do `set_params` and `set_weights`. The average of a tensor that its group keeps
        as it is is that tensor.

        Raises:
            ConfigError: no average is kept.

        >>> with DistNadam(use_ema=True, backend="local").build(np.ones(2)) as optimizer:
        ...     optimizer.set_ema_params(np.zeros(2))
        ...     optimizer.get_ema_params()
        array([0., 0.])
        """
        self._require_ema()
        return self._read_tree("ema")

    def set_ema_params(self, average: Any) -> None:
        """Replace the average of the parameters, as `set_params` replaces these;
        ``set_ema_params(get_params())`` begins it again, in the parameters' own dtypes. The first
        step makes it anew, whatever was set before.

        Raises:
            ConfigError: no average is kept.
            StructureError: naming the tensor that does not fit; nothing was changed.
        """
        self._require_ema()
        self._write_tree("ema", average, "average")

    def get_weights(self) -> list[Array]:
        """Return Keras's ``[iterations, m_schedule, *ms, *vs]``: 0-d int64, 0-d float64, arrays.

        Raises:
            ConfigError: a tensor has another clock than the optimizer's, which the list cannot hold
                (see `clocks`, and `Group.beta_1`).
        """
        shards = self._life.shards
        clock, state = shards.read(("m", "v"))
        return to_weights(shards.layout, clock, state["m"], state["v"])

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Load what `get_weights` returned, here or in Keras (whose m_schedule is float32).

        Open pushes are refused with StaleEpoch. `Options(check_gradients=False)` lets NaN in.

        Raises:
            StructureError: (a ValueError) naming the expected and given length, or index and shape.
        """
        shards = self._life.shards_to_change()
        clock, m, v = from_weights(shards.layout, weights, finite=self._takes_only_finite)
        shards.fill({"m": m, "v": v}, clock)

    @property
    def _takes_only_finite(self) -> bool:
        return self._life.settings.options.check_gradients

    def _require_ema(self) -> None:
        if not self._life.settings.config.use_ema:
            raise ConfigError(
                "this optimizer keeps no average of its parameters: make it with use_ema=True"
            )

    def _read_tree(self, name: str) -> Any:
        shards = self._life.shards
        return shards.layout.tree(shards.read((name,))[1][name])

    def _write_tree(self, name: str, tree: Any, what: str) -> None:
        shards = self._life.shards_to_change()
        finite = self._takes_only_finite
        shards.fill({name: params_from(shards.layout, tree, what=what, finite=finite)})
