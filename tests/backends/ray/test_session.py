"""Which Ray an optimizer ends up on: this process's, the one of RAY_ADDRESS, our own, or none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from distnadam.backends.ray.joined import why_lost_while_starting
from distnadam.backends.ray.session import connect_or_start

pytestmark = pytest.mark.timeout(120)

CONNECT = """
import ray
from distnadam.backends.ray.session import connect_or_start
from distnadam.errors import DistNadamError
try:
    owned = connect_or_start(None, start={start})
except DistNadamError as error:
    print(type(error).__name__, error)
else:
    print("owned" if owned is not None else "joined", ray.is_initialized())
    if owned is not None:
        owned.shut_down()
        print("shut down", ray.is_initialized())
"""


def connect(*, start: bool, **env: str) -> str:
    """What a process says that connects with these variables set."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CONNECT.format(start=start)],
        env=inherited | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_with_neither_a_ray_nor_an_address_there_is_nothing_to_connect_to() -> None:
    assert connect(start=False).startswith("NotRunning no Ray runs in this process")


def test_an_address_that_does_not_resolve_is_refused_at_once() -> None:
    said = connect(start=True, RAY_ADDRESS="nowhere.invalid:6379")
    assert said.startswith("ClusterError nobody answers at RAY_ADDRESS=nowhere.invalid:6379")
    assert "expected the address of a running Ray's head, as HOST:PORT" in said


def test_a_ray_that_this_process_is_on_already_is_used(ray_cluster: None) -> None:
    assert connect_or_start(None) is None
    assert connect_or_start(None, start=False) is None
    assert ray.is_initialized()


def test_the_ray_of_the_address_is_joined_and_not_owned(ray_cluster: None) -> None:
    address = ray.get_runtime_context().gcs_address
    said = connect(start=False, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert said == "joined True\n"


@pytest.mark.nightly
def test_a_ray_of_our_own_is_shut_down_by_its_owner() -> None:
    assert connect(start=True, RAY_AUTH_MODE="token") == "owned True\nshut down False\n"


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_of_a_ray_that_starts_is_named_once_it_was_killed(
    tmp_path: Path, name: str
) -> None:
    program = tmp_path / name
    shutil.copy("/bin/sleep", program)
    assert why_lost_while_starting() is None
    with subprocess.Popen([program, "600"]) as process:
        assert why_lost_while_starting() is None, "it lives"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        told = f"its {name} (process {process.pid}) was killed while it started"
        assert why_lost_while_starting() == told
    with subprocess.Popen([program, "no time"], stderr=subprocess.DEVNULL) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert why_lost_while_starting() is None, "it ended by itself, and would again"


SILENT_HEAD = """
import os, signal
import ray
from ray._private import worker
from distnadam.backends.ray import session
session._SHUT_DOWN_S = 2.0
owned = session.connect_or_start(None)
(head,) = worker._global_node.all_processes["gcs_server"]
os.kill(head.process.pid, signal.SIGSTOP)
owned.shut_down()
print("shut down", not ray.is_initialized(), head.process.poll() is not None)
"""


@pytest.mark.slow
def test_a_ray_of_our_own_whose_head_stands_still_is_shut_down_all_the_same() -> None:
    """Ray itself waits for ever for its head, in a call that no signal ends."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    command = [sys.executable, "-c", SILENT_HEAD]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout.splitlines()[-1:] == ["shut down True True"], done.stderr
