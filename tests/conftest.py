"""What several test files share: one Ray for the whole run, a model whose tensors are cut in the
middle, its gradients, its digest.
"""

import os
import signal

os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0"
)
os.environ.pop("RAY_ADDRESS", None)

from collections.abc import Iterator

import pytest

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell that runs the tests in its background has them ignore Ctrl-C


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=400 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(params=["local", "ray"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; Ray is started only for the tests that use it."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)
