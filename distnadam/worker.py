"""One data-parallel worker: pushes gradients for each round, and sees the parameters in between.

It checks and copies trees, and counts what it moves. No maths, no Ray.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import Any, Self

from distnadam.client.given_settings import GivenSettings
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.in_flight_push import InFlightPush
from distnadam.client.ordinary_step import step_at_once
from distnadam.client.parameter_view import ParameterView
from distnadam.client.seen_rounds import SeenRounds
from distnadam.client.shard_group import ShardGroup
from distnadam.client.ticket import Ticket
from distnadam.client.worker_meter import WorkerMeter
from distnadam.client.worker_session import WorkerSession
from distnadam.errors import DistNadamError, LifecycleError, NotOpen, StaleEpoch
from distnadam.nadam.step_overrides import Betas, BetasByGroup, Rates
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.tensors.arrays import Array, Flat


class Worker(SeenRounds, set_once={"rank", "session"}):
    """One rank of a data-parallel run; made by `DistNadam.worker`, used by one thread at a time.

    What `pull` and `step` return is read-only, owned by the worker, and valid until its next call;
    copy to keep. The system ends a process that writes to it all the same, as torch does in place
    through `torch.from_numpy`: give torch ``torch.tensor(tree["w"])``, a copy. Unpickling a worker
    makes a new one that takes the rank over.

    With ``pull_dtype="bfloat16"`` every worker, wherever it is, sees each parameter whose master is
    float32 (that is all but float64 ones) as an array of bfloat16 (ml_dtypes), rounded to nearest
    even, in half the bytes; a number beyond bfloat16's largest, 3.39e38, becomes infinite. The
    shards step the masters, which `get_params`, checkpoints and `Task.evaluate` have. To take such
    an array without a copy: ``torch.from_numpy(w.view(np.int16)).view(torch.bfloat16)``, or
    ``jax.device_put(w)``. Gradients may have any dtype that they may have without it.

    Raises:
        LifecycleError: in every method but `close`: the worker was closed, or the optimizer was.

    >>> with DistNadam(backend="local").build({"w": np.ones(2, np.float32)}) as optimizer:
    ...     worker = optimizer.worker(0)
    ...     ones = np.ones_like(worker.pull()["w"])
    ...     stepped = worker.step({"w": ones})["w"].copy()
    ...     applied = worker.push({"w": ones}).result()
    ...     worker.push_tensor("w", ones)  # each as the backward pass yields it
    ...     applied = worker.push().result()
    ...     worker.accumulate({"w": ones})  # a micro-batch
    ...     worker.discard()
    ...     skipped = worker.push(found_inf=True)  # its scaled gradients overflowed
    ...     applied = skipped.result()
    ...     warm = worker.step({"w": ones}, lr=1e-4, betas=(0.85, 0.99))  # of this step alone
    ...     used = worker.settings.lr[None], worker.settings.betas, worker.settings.iterations
    ...     worker.gradients()["w"][:] = 1.0  # no copy
    ...     same = worker.step()["w"] is worker.parameters()["w"]
    ...     rank, rounds = worker.rank, worker.round
    ...     worker.close()
    >>> stepped.tolist(), applied, skipped.found_inf, used, same, rank, rounds
    ([0.9978..., 0.9978...], 3, True, (0.0001, (0.85, 0.99), 4), True, 0, 6)
    """

    def __init__(self, shards: ShardGroup, rank: int) -> None:
        self.rank = rank
        self.session = WorkerSession(shards, rank, self._receive)
        self._shards = shards
        self._given = GivenSettings(shards)
        self._closed = False
        self._view = ParameterView(shards.layout)
        self._shield = shards.backend.shield
        meter = shards.backend.meter
        self._meter = None if meter is None else WorkerMeter(meter, shards.layout)
        self._accumulated_at = (0, 0)  # epoch and round

    @cached_property
    def _buffer(self) -> GradientBuffer:
        return GradientBuffer(
            self._shards.layout,
            f"worker {self.rank}",
            self.session.channel.gradients,
            check=self._shards.options.check_gradients,
            compiled=self._shards.options.kernel != "numpy",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._shards.backend.name == "local":
            raise LifecycleError(
                "a local optimizer's worker lives in its process and cannot be pickled; use "
                "backend='ray' to share it"
            )
        return Worker, (self._shards, self.rank)

    def __repr__(self) -> str:
        if "_closed" not in vars(self):
            return "<Worker: not made>"
        state = "closed" if self._closed else f"round {self.session.round}"
        return f"<Worker: rank {self.rank}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def pull(self) -> Any:
        """Return the present parameters in the structure given to `build`, each in its own dtype,
        or in the optimizer's `pull_dtype`.

        A push of this worker that is not decided yet is waited for first.

        Raises:
            Rewound, StepTimeout, WorkerLost, Unrecoverable: as `Ticket.result`.
        """
        self._settle()
        began = perf_counter()
        self.session.pull(want_parameters=True)
        if self._meter is not None:
            self._meter.pulled(perf_counter() - began, self.session.channel, self._buffer)
        return self._view.tree(self.session.channel.parameters, self.session.buffer)

    def push(
        self,
        gradients: Any = None,
        *,
        found_inf: bool = False,
        lr: Rates | None = None,
        betas: Betas | BetasByGroup | None = None,
    ) -> Ticket:
        """Send this rank's gradients for the next round; the ticket's `result` waits for it.

        They count once, even if a Ctrl-C or a timeout interrupts this call or `result`: the
        worker's next call completes them.

        Args:
            gradients: a tree like the one given to `build`, of floating-point arrays of the same
                shapes; they may be reused at once. If all of them come in one half precision, half
                the bytes are moved, and summed in float32. With ``clocks="tensor"`` any of them
                may be None. For the whole tree None means what was written into the views of
                `gradients()`, or given tensor by tensor to `push_tensor`, or the mean of what
                `accumulate` has summed.
            found_inf: whether this rank's loss-scaled gradients overflowed. If one rank says so,
                all skip the round, whatever `Options.on_nonfinite` and other ranks' gradients say.
                This rank's are not looked at, and may be None; what came for the round otherwise is
                dropped.
            lr: the learning rate of this step alone: of tensors in no group, by which groups with
                an `lr_scale` go too; or ``{pattern: rate}`` by group, with None for tensors in no
                group. What is not given is as the optimizer has it.
            betas: (beta_1, beta_2) of this step alone; or ``{pattern: betas}`` by group.
                All ranks of a round must give the same of both, to the bit; else it is refused for
                all (`RanksDisagree`), and the next may be pushed.

        Raises:
            ConfigError: a learning rate or a beta is out of its range, or there is no such group;
                nothing was sent.
            StructureError: a tensor's path, shape or dtype is not the model's, or was not pushed;
                nothing was sent.
            LifecycleError: there is nothing to send, or micro-batches were accumulated, and a
                whole gradient is given.
            StaleEpoch: the shards do not stand where micro-batches were accumulated; they were
                dropped, and nothing was sent.
        """
        with self._shield:
            given = found_inf or lr is not None or betas is not None
            settings = self._given.of(found_inf, lr, betas) if given else ORDINARY
            push = self._push(gradients, settings, want_parameters=False)
            return Ticket(self.session, push)

    def step(
        self,
        gradients: Any = None,
        *,
        found_inf: bool = False,
        lr: Rates | None = None,
        betas: Betas | BetasByGroup | None = None,
    ) -> Any:
        """Push this rank's gradients, wait for the round's step, and return the new parameters.

        Args:
            gradients: as `push` takes them.
            found_inf: as `push` takes it.
            lr: as `push` takes it.
            betas: as `push` takes them.

        Raises:
            ConfigError, StructureError, LifecycleError: as `push`. NonFiniteGradient,
            RanksDisagree, StaleEpoch, Rewound, StepTimeout, WorkerLost, Unrecoverable: as
            `Ticket.result`.
        """
        session, began = self.session, perf_counter()
        with self._shield:
            given = found_inf or lr is not None or betas is not None
            settings = self._given.of(found_inf, lr, betas) if given else ORDINARY
            if self._meter is None and session.in_sync and not session.ahead.written:
                settings, rejection = self._ready(gradients, settings, session.channel.written_here)
                push = step_at_once(session, self._buffer, rejection, settings)
            else:
                push = self._push(gradients, settings, want_parameters=True)
            if push.ended is None:
                session.wait_for(push)
            if self._meter is not None:
                self._meter.stepped(perf_counter() - began)
            return self._view.tree(session.channel.parameters, session.buffer)

    def accumulate(self, gradients: Any) -> None:
        """Add a micro-batch's gradients to this worker's sum for the next round.

        `push()` or `step()` without an argument divides the sum by the number of micro-batches,
        once, checks that the mean is finite, and sends it. All ranks of a round must accumulate
        equally many; else the round is refused for all (`RanksDisagree`), and the next may be
        pushed. The sum is in float32, in float64 for float64 parameters, whatever comes. It lies in
        this worker alone: a rank that is started again computes all its micro-batches again.

        Args:
            gradients: as `push` takes them; they may be reused at once.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's; nothing was added.
            LifecycleError: tensors were pushed for the round, or `gradients()` has given views of
                the memory that the sum lies in.
            StaleEpoch: the shards do not stand any more where the sum was begun, or were cut anew;
                it was dropped. Pull, and compute all micro-batches of the round again.
            NonFiniteGradient, RanksDisagree, StepTimeout, WorkerLost, Unrecoverable: of this
                worker's push in flight, as `Ticket.result`; nothing was added.
        """
        self._settle()
        with self._shield:
            self.session.sync()
            self._require_place()
            self._buffer.accumulate(gradients)
            self._accumulated_at = (self.session.epoch, self.session.round)

    def discard(self) -> None:
        """Drop the micro-batches that were accumulated since the last push."""
        self._require_open()
        self._buffer.discard()

    def push_tensor(self, path: str, gradient: Any) -> None:
        """Copy one tensor's gradient, as the backward pass yields it.

        Once all have come, `push()` or `step()` without an argument sends them; with clocks of
        tensors what has not come is None. To shards of other hosts pieces of a MiB or more leave
        while the rest is computed, unless `sum_group` is above 1, where only a group's sum crosses,
        or `gradients()` has given views of them.

        Args:
            path: the tensor's place in the tree given to `build`, such as ``"layers/0/kernel"``.
            gradient: a floating-point array of its shape; it may be reused at once.

        Raises:
            StructureError: no such tensor, given twice, or of another shape or kind of dtype.
            LifecycleError: micro-batches were accumulated for the round.
        """
        self._settle()
        if self.session.loss_scale is None:
            self.session.sync()
        self._buffer.loss_scale = self.session.loss_scale or 0.0
        tensor = self._buffer.write(path, gradient)
        if not self._buffer.has_views:  # through which it may be changed until the push
            with self._shield:
                self.session.ahead.wrote(tensor)

    def gradients(self, dtype: str | None = None) -> Any:
        """Return writable views of this worker's gradients, in the structure given to `build`.

        `push()` or `step()` without an argument sends what they hold; with a tree of them, in which
        some may be None, too. Shards of the same machine read that memory, so nothing is copied.
        Write to them only between a call that ended a round (`step`, `pull`, `Ticket.result`) and
        the next push; they stay valid for the worker's life.

        Args:
            dtype: None for float32 (float64 if the parameter is), or "float16" or "bfloat16" for
                half the bytes.

        Raises:
            LifecycleError: micro-batches were accumulated for the round, or tensors were pushed in
                float32 and half precision is asked for.
        """
        self._settle()
        if dtype is not None and self.session.loss_scale is None:
            self.session.sync()
        self._buffer.loss_scale = self.session.loss_scale or 0.0
        views = self._buffer.views(dtype)
        self.session.ahead.forget()
        return views

    def parameters(self) -> Any:
        """Return the parameters as this worker last saw them, read-only; a first call pulls them.

        Like what `step` returns, they are views if the worker shares memory with the shards. They
        do not change until the next round but one is applied, so a round's own gradient can still
        be computed from them after it was pushed.

        Raises:
            Rewound, StepTimeout, WorkerLost, Unrecoverable: of a first call, as `pull`.
        """
        session, is_known = self.session, self.session.in_sync and self.session.is_readable
        if not (is_known and (session.channel.parameters is not None or self._view.has_own)):
            return self.pull()
        self._require_open()
        return self._view.tree(self.session.channel.parameters, self.session.buffer)

    def close(self) -> None:
        """Leave after a whole step; the rank stays free for a new worker."""
        if not self._closed:
            self._closed = True
            with suppress(DistNadamError):  # the optimizer is gone already
                self.session.leave()

    def _push(
        self, gradients: Any, settings: RoundSettings, *, want_parameters: bool
    ) -> InFlightPush:
        began = perf_counter()
        settings, rejection = self._ready(gradients, settings)
        push = self.session.push(
            self._buffer.parts,
            rejection,
            want_parameters=want_parameters,
            settings=settings,
            is_ahead=gradients is None and not settings.found_inf,
        )
        if self._meter is not None:
            self._meter.pushed(perf_counter() - began, self.session.channel, self._buffer)
        return push

    def _ready(
        self, gradients: Any, settings: RoundSettings, written: Sequence[Array] | None = None
    ) -> tuple[RoundSettings, str | None]:
        """Have the round's gradients in the buffer, or borrow them if what a step has `written` is
        known, once no push is in flight; return what is said with them, and why not to use them.
        """
        if self._closed or self.session.in_flight is not None:
            self._settle()
        buffer = self._buffer
        micro_steps = max(1, buffer.micro_steps)
        if settings.found_inf:
            return settings, buffer.overflowed()
        if self.session.loss_scale is None:
            self.session.sync()
        buffer.loss_scale = self.session.loss_scale or 0.0
        if gradients is not None:
            rejection = buffer.borrow(gradients, written) if written else buffer.fill(gradients)
        else:
            if buffer.micro_steps:
                self.session.sync()
                self._require_place()
            rejection = buffer.finish()
        if micro_steps > 1 or buffer.absent:
            settings = replace(settings, micro_steps=micro_steps, absent=buffer.absent)
        if rejection is not None and buffer.loss_scale:
            settings = replace(settings, found_inf=True)
        return settings, rejection

    def _require_place(self) -> None:
        """Drop a sum of micro-batches of another place than where the shards stand, and raise
        StaleEpoch.
        """
        session, count = self.session, self._buffer.micro_steps
        if count and self._accumulated_at != (session.epoch, session.round):
            epoch, number = self._accumulated_at
            self._buffer.discard()
            raise StaleEpoch(
                f"worker {self.rank}: {count} micro-batches were accumulated after round {number} "
                f"in epoch {epoch}, and the shards stand at round {session.round} in epoch "
                f"{session.epoch}; they were dropped: pull, and compute them again",
                session.epoch,
                session.round,
            )

    def _settle(self) -> None:
        """Wait for the push in flight, if any."""
        self._require_open()
        if self.session.in_flight is not None:
            self.session.wait_for(self.session.in_flight)

    def _receive(self, shard: int, parameters: Flat) -> None:
        """Copy the parameters that one shard's answer brought."""
        self._view.fill(self.session.ranges[shard], parameters)

    def _require_open(self) -> None:
        if self._closed:
            raise NotOpen(f"worker {self.rank} was closed")
