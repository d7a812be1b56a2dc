"""What all test files share: one Ray for each process that runs tests, with a directory of its own.

Tests run in several processes side by side (`make test` says how many), so none may count what the
machine has: only what is below its own process, or in its own Ray.
"""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.update(
    OMP_NUM_THREADS="1",  # processes that run tests share the cores
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.pop("RAY_ADDRESS", None)
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is None:
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rt-")  # short: it holds sockets
    os.chmod(os.environ["RAY_TMPDIR"], 0o755)  # as open to other users as Ray's own /tmp/ray
RAY_DIR = os.environ["RAY_TMPDIR"]
if worker is not None:
    os.environ["RAY_TMPDIR"] = f"{RAY_DIR}/{worker}"  # in the one of the process that started it

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell that runs the tests in its background has them ignore Ctrl-C


# How fast examples are made says nothing where several processes share the cores.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


ONE_PROCESS_EACH = (
    ("tests/chaos/", "tests/hosts/"),
    ("tests/backends/test_contract.py",),
    ("tests/backends/ray/test_calls.py",),
    ("tests/backends/ray/test_shared_memory.py",),
    ("tests/cli/test_running.py",),
    ("tests/security/test_lanes.py",),
    ("tests/supervision/test_process_manager_contract.py",),
)
"""What one process runs, one test after the other: folders whose tests load the machine each by
itself, and mostly wait, and files whose tests share what costs much.
"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group to one process, the largest first, and other tests to whichever is free.

    xdist's own groups (3.8) have no effect with pytest 9.2, whose ids of tests cannot be changed.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next(
                (group[0] for group in ONE_PROCESS_EACH if nodeid.startswith(group)), nodeid
            )

    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the cases on Ray that `on_ray` does not name their tier.

    Coverage is not measured in the laws, and while Hypothesis tries hundreds of examples: that
    takes as long again, and other tests pass there.
    """
    for item in items:
        is_property = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if (
            "tests/laws/" in item.nodeid
            or is_property
            or "examples" in getattr(getattr(item, "callspec", None), "params", ())
        ):
            item.add_marker(pytest.mark.no_cover)
        if (chosen := item.get_closest_marker("on_ray")) is not None:
            case = item.callspec.id
            if case.startswith("ray") and case not in chosen.args:
                is_slow = case in chosen.kwargs.get("slow", [])
                item.add_marker(pytest.mark.slow if is_slow else pytest.mark.nightly)
        if item.get_closest_marker("nightly") is not None:
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure() -> None:
    """Remove what Ray left, once all processes that ran tests have ended."""
    if worker is None:
        shutil.rmtree(RAY_DIR, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    from distnadam.backends.ray.session import shut_down_ray

    with open(f"{RAY_DIR}/starting", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one after the other, or none is up in the time it has
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,  # that Ray counts and gives out as any others
            include_dashboard=False,
            object_store_memory=400 * 2**20,
            log_to_driver=False,
        )
    # it looks for new output ten times a second, for nobody
    ray._private.worker._global_node.kill_log_monitor()
    yield
    shut_down_ray()


@pytest.fixture
def untraced() -> Iterator[None]:
    """Measure no coverage: a handler that raises in its tracer leaves a lock of its held."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture(scope="module")
def one_process(request: pytest.FixtureRequest) -> None:
    """Fail where two processes run a module's tests, which share what costs much."""
    with open(f"{RAY_DIR}/{request.module.__name__}.pid", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        first = file.read() or str(os.getpid())
        file.truncate(0)
        file.write(first)
    assert first == str(os.getpid()), "ONE_PROCESS_EACH must name this module"


@pytest.fixture(autouse=True)
def _shared_ray_goes_on() -> Iterator[None]:
    """Fail a test that ends the Ray which the tests of its process share.

    Each later test on Ray would start a Ray of its own.
    """
    before = is_ray_running()
    yield
    assert is_ray_running() >= before, "this test ended the Ray that others share"


@pytest.fixture(autouse=True)
def _interrupts_are_python_s() -> Iterator[None]:
    """Take back what Ray Train's `fit` leaves: a handler that heeds no Ctrl-C but the third."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_ray_running() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@pytest.fixture(params=["local", "ray"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; Ray is started only for the tests that use it."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)
