"""The thread that does the host's part of steps which JAX has compiled into a program."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def host_thread() -> ThreadPoolExecutor:
    """Return the thread. XLA's own flush denormals, which a step refuses; this one is begun by a
    thread of Python's, whose rounding it inherits.
    """
    host = ThreadPoolExecutor(1, thread_name_prefix="distnadam-step")
    host.submit(int).result()
    return host
