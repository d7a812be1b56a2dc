"""A rank's objects in threads of this process. No Ray."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from threadpoolctl import threadpool_limits
from typing_extensions import override

from distnadam.backends.base import WorkerGroup
from distnadam.copies import copied
from distnadam.tensors.arrays import memory_for
from distnadam.threads import renew_after_fork


class LocalWorkerGroup(WorkerGroup):
    """Threads of this process; a member that is ended runs on until its own call returns.

    Args:
        size: ranks.
        make: makes a rank's object, of copies of `given`.
        given: is copied as if it went to another process, so that members share nothing.
        threads: of the numerical libraries (BLAS, OpenMP) that each rank computes with. Ray sets
            as many; with another number their sums have other bits.
    """

    def __init__(
        self, size: int, make: Callable[..., Any], given: tuple[Any, ...], *, threads: int
    ) -> None:
        self._make = make
        self._given = given
        self._threads = threads
        self._limits = threadpool_limits(threads)
        self._members = {rank: self._made(rank) for rank in range(size)}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Have threads of this process; what the parent's were called for is the parent's."""
        self._pool = ThreadPoolExecutor(len(self._members), "worker")
        self._calls: dict[Future[Any], int] = {}

    @override
    def call(self, rank: int, method: str, *args: Any) -> None:
        with memory_for(f"the thread of worker {rank}"):
            self._calls[self._pool.submit(self._run, rank, method, args)] = rank

    @override
    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        done, _ = wait(self._calls, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return [(self._calls.pop(future), future.exception() or future.result()) for future in done]

    @override
    def hosts(self) -> dict[int, str]:
        return dict.fromkeys(self._members, "this process")

    @override
    def end(self, rank: int) -> None:
        self._calls = {future: r for future, r in self._calls.items() if r != rank}

    @override
    def start(self, rank: int) -> None:
        self._members[rank] = self._made(rank)

    @override
    def close(self) -> None:
        self._pool.shutdown()
        self._limits.restore_original_limits()

    def _run(self, rank: int, method: str, args: tuple[Any, ...]) -> Any:
        threadpool_limits(self._threads)  # OpenMP has a number for each thread that calls it
        return getattr(self._members[rank], method)(*args)

    def _made(self, rank: int) -> Any:
        return self._make(rank, *copied(self._given, f"worker {rank}"))
