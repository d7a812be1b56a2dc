"""What a program that JAX has compiled asks of the host: the steps of one optimizer. Imports JAX.

JAX is not told to keep the calls in order, as it could: it does so by a token that each call takes
from the one before, of whichever library, and one that failed would fail all after it, for the life
of the process. They come in order all the same, since an update takes the parameters that the one
before has returned; each optimizer refuses what is computed otherwise.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar
from weakref import WeakSet

import jax
import jax.numpy as jnp
from jax.experimental import io_callback


class HostCalls:
    """The calls of one optimizer, made by a thread of its own: XLA's flush denormals, which a step
    refuses, and this one is begun by a thread of Python's, whose rounding it inherits.

    What a call raises fails the program that has made it, and JAX raises an error of its own with
    that text: where the program is called, if it runs at once, else where its results are first
    looked at.
    """

    _all: ClassVar["WeakSet[HostCalls]"] = WeakSet()

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._refused: Exception | None = None  # what the last call raised
        self._untold: Exception | None = None  # the same, while JAX has it still to tell
        self._all.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return HostCalls, ()

    def traced(self, call: Callable[..., Any], like: Sequence[Any], *given: Any) -> list[Any]:
        """Return what a call will return when the program runs: arrays like these."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="distnadam-step")
            self._thread.submit(int).result()  # begun by this thread
        submit = self._thread.submit
        shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in like]
        returned: list[Any] = io_callback(
            lambda *values: submit(self._made, call, values).result(), shapes, *given
        )
        return returned

    def _made(self, call: Callable[..., Any], values: Sequence[Any]) -> Any:
        try:
            returned = call(*values)
        except Exception as error:
            self._refused = error
            raise
        self._refused = self._untold = None
        return returned

    def wait(self) -> Exception | None:
        """Wait for the calls of programs that this thread has started; return what has refused the
        last, once, if JAX has it still to tell.
        """
        try:
            jax.effects_barrier()
        except jax.errors.JaxRuntimeError as error:
            refusing = [calls for calls in self._all if calls._has_refused(str(error))]
            if not refusing:
                raise
            for calls in refusing:
                calls._untold = calls._refused
            _forget_errors()
        untold, self._untold = self._untold, None
        return untold

    def _has_refused(self, said: str) -> bool:
        """Whether what JAX has said is of the last call."""
        refused = self._refused
        return refused is not None and f"{type(refused).__name__}: {refused}" in said

    def settle(self) -> None:
        """Do what `wait` does, and raise what it returns."""
        if (refused := self.wait()) is not None:
            raise refused


def _forget_errors() -> None:
    """Have JAX not tell again of calls that failed: it keeps the last one of each device."""
    like = jax.ShapeDtypeStruct((), jnp.int32)
    call = jax.jit(lambda number: io_callback(lambda given: given, like, number))
    for device in jax.local_devices():
        call(jax.device_put(jnp.zeros((), jnp.int32), device)).block_until_ready()
    jax.effects_barrier()
