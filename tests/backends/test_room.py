"""A run that needs more memory than a process's control group lets it have is refused, with the
figures, before it takes any.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distnadam.transport import available_memory
from distnadam.transport.available_memory import available_bytes
from tests.control_groups import Group, memory_group

MIB = 2**20
LOCAL = """
import numpy as np
from distnadam import DistNadam
from distnadam.errors import InsufficientResources
from distnadam.transport.available_memory import available_bytes

def refused(call):
    try:
        call()
    except InsufficientResources as error:
        print(error)

params = {"w": np.ones(4 * 10**7, np.float32)}
refused(lambda: DistNadam(num_shards=2, backend="local").build(params))
params = {"w": np.ones(10**7, np.float32)}
with DistNadam(num_shards=2, backend="local").build(params) as one:
    one.apply_gradients(params)
    ballast = np.ones(available_bytes() - 60 * 2**20, np.uint8)
    refused(lambda: one.reshard(3))
    print(one.apply_gradients(params), len(one.shards.ranges))
    del ballast
    one.reshard(3)
    print(one.apply_gradients(params), len(one.shards.ranges))
"""


def run_in(group: Group, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        preexec_fn=lambda: group.add([os.getpid()]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_a_group_has_left_is_what_is_available_without_what_files_are_cached() -> None:
    with memory_group() as group:
        group.limit(200 * MIB)
        code = "from distnadam.transport.available_memory import available_bytes as a; print(a())"
        left = int(run_in(group, "-c", code))
        assert 100 * MIB < left < 200 * MIB < available_bytes()
        fill = "import tempfile; f = tempfile.TemporaryFile(dir='.'); f.write(bytes(150 << 20))"
        assert int(run_in(group, "-c", f"{fill}; f.flush(); {code}")) > 100 * MIB


def test_a_local_optimizer_or_reshard_that_does_not_fit_is_refused_and_the_rest_goes_on() -> None:
    with memory_group() as group:
        group.limit(640 * MIB)
        first, second, *rest = run_in(group, "-c", LOCAL).splitlines()
    assert first.startswith("this process has ") and first.endswith("(pull_dtype)"), first
    assert (
        "needs 611 MiB: 306 MiB for two buffers of the parameters, 306 MiB for the state of "
        "shards 0, 1; use more hosts or larger ones"
    ) in first
    assert "needs 77 MiB: 77 MiB for a second copy of the state" in second
    assert rest == ["2 2", "3 3"]


@pytest.mark.parametrize(
    ("limit", "stat", "left"),
    [
        ("max", "", []),
        ("1000", "anon 1\ninactive_file 300\nactive_file 100\nslab_reclaimable 200", [700]),
        ("1000", "anon 1\ninactive_file 300\nactive_file 100", [500]),
        ("1000", "", [100]),
        ("800", "", [0]),
    ],
)
def test_what_the_system_drops_for_others_is_left(
    limit: str, stat: str, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"max": limit, "current": "900", "stat": stat}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    cached = available_memory._VERSION_2.cached
    hierarchy = available_memory.Hierarchy(str(tmp_path), "memory.max", "memory.current", cached)
    monkeypatch.setattr(available_memory, "groups_of_memory", lambda: iter([(hierarchy, "")]))
    assert [*available_memory._group_room()] == left
