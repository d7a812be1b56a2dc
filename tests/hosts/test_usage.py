"""What counts as flat."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.usage import (
    GROWTH_BYTES,
    GROWTH_DESCRIPTORS,
    Life,
    flat_or_not,
    own_bytes,
    role_of,
)

MAPS = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[:: mmap.PAGESIZE])
print("mapped", flush=True)
written = bytearray(int(sys.stdin.readline()))
for at in range(0, len(written), mmap.PAGESIZE):
    written[at] = 1
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("sizes", "descriptors", "flat"),
    [
        ([50] * 100, [60] * 100, True),
        ([50] * 10 + [90] * 90, [60] * 100, True),  # what it takes while it warms up
        ([50] * 50 + [900] + [50] * 49, [60] * 100, True),  # a moment's
        ([50 + second for second in range(100)], [60] * 100, False),
        ([50] * 100, [60 + second for second in range(100)], False),
        ([50] * 100, [60] * 30 + [60 + GROWTH_DESCRIPTORS + 1] * 70, False),
        ([50 + second for second in range(20)], [60] * 20, True),  # not old enough to say
    ],
)
def test_a_process_that_keeps_growing_is_not_flat(
    sizes: list[int], descriptors: list[int], flat: bool
) -> None:
    each = enumerate(zip(sizes, descriptors, strict=True))
    samples = [(float(second), size * 2**20, number) for second, (size, number) in each]
    found = flat_or_not([Life("Shard", 7, samples)], warm_up_s=20, window_s=10)
    assert bool(found) != flat, found
    assert GROWTH_BYTES < 50 * 2**20
    assert all("NOT FLAT: shard, process 7" in sentence for sentence in found)


def test_roles_are_read_from_command_lines() -> None:
    assert role_of("ray::distnadam soak Shard 1") == "Shard"
    assert role_of("ray::distnadam Worker 0") == "Worker"
    assert role_of("python -m tests.hosts.train {}") == "Driver"
    assert role_of("nsenter -t 7 -n -- python -m tests.hosts.train {}") is None
    assert role_of("ray::IDLE") is None
    assert role_of("") is None


def test_a_driver_may_grow_by_what_its_history_has_and_no_other_process() -> None:
    steps = 2 * GROWTH_BYTES // 200
    samples = [(float(second), second * GROWTH_BYTES // 50, 60) for second in range(100)]
    for role, expected in (("Driver", 0), ("Shard", 1)):
        life = Life(role, 7, samples)
        assert len(flat_or_not([life], 20, 10, steps)) == expected
        assert len(flat_or_not([life], 20, 10)) == 1


def test_a_file_that_others_have_stopped_mapping_is_not_its_own_and_what_it_writes_is(
    tmp_path: Path,
) -> None:
    """As the compiler's library, 60 MiB, is of the last worker that has it."""
    size = 8 * 2**20
    with open(tmp_path / "library", "wb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAPS, file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        one, other = processes
        assert _line(one) == _line(other) == "mapped"
        before, clean = own_bytes(one.pid), _clean_bytes(one.pid)
        other.kill()
        other.wait()
        after = own_bytes(one.pid)
        if _clean_bytes(one.pid) < clean + size:
            pytest.skip("temporary files lie in memory here")
        assert after - before < size / 2
        assert one.stdin is not None
        one.stdin.write(f"{size}\n")
        one.stdin.flush()
        assert _line(one) == "written"
        assert own_bytes(one.pid) - after > size / 2
    finally:
        for process in processes:
            with process:
                process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _clean_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(each.split()[1]) for each in lines if each.startswith("Private_Clean:"))
