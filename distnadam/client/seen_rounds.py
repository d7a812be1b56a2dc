"""What a worker reads of the rounds that it has seen the end of."""

from distnadam.client.fixed_attributes import FixedAttributes
from distnadam.client.shard_group import ShardGroup
from distnadam.client.step_settings import StepSettings, settings_of
from distnadam.client.worker_session import WorkerSession
from distnadam.protocol.messages import NO_NORM


class SeenRounds(FixedAttributes):
    """The properties of a worker that say where the shards stood when it last looked."""

    session: WorkerSession
    _shards: ShardGroup

    @property
    def round(self) -> int:
        """Rounds decided when this worker last looked; its next push is for the one after.

        Batches follow it.
        """
        self._require_open()
        self.session.sync()
        return self.session.round

    @property
    def found_inf(self) -> bool:
        """Whether the last round that this worker saw the end of was skipped since a rank voted so.

        All ranks that saw that round's end see the same, so their loss scales stay equal.
        """
        return self.session.outcome == "voted"

    @property
    def loss_scale(self) -> float:
        """What this worker is to multiply its loss by for its next push; 1 if there is no scale.

        It is the same on all ranks, and may be another after each round.
        """
        self._require_open()
        self.session.sync()
        return self.session.loss_scale or 1.0

    @property
    def is_scaled(self) -> bool:
        """Whether the shards keep a loss scale, so that they take gradients of scaled losses."""
        self._require_open()
        self.session.sync()
        return bool(self.session.loss_scale)

    @property
    def gradient_norm(self) -> float | None:
        """The norm of the mean gradient of the last round that this worker saw, over all tensors,
        before it was clipped; None where clipping needed no norms, or they were lost with a shard.

        >>> with DistNadam(global_clipnorm=1.0, backend="local").build(np.ones(2)) as optimizer:
        ...     worker = optimizer.worker(0)
        ...     _ = worker.step(np.array([3.0, 4.0]))
        ...     worker.gradient_norm
        5.0
        """
        norm = self.session.gradient_norm
        return None if norm == NO_NORM else norm

    @property
    def settings(self) -> StepSettings:
        """The learning rates and betas of the last applied step, and the round that is decided, so
        that the scheduler of a worker that takes a rank over catches up; never waits for a round.
        """
        self._require_open()
        return settings_of(self._shards.describe())

    def _require_open(self) -> None:
        """Raise NotOpen if the worker was closed."""
        raise NotImplementedError
