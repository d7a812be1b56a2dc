"""A wait spins only where there are more cores than processes, by affinity and by quota."""

import itertools
import math
import os
from pathlib import Path
from typing import Any

import pytest

from distnadam.transport import spinning
from distnadam.transport.spinning import has_free_cores, quota, spin


@pytest.mark.parametrize(
    ("cores", "limit", "processes", "free"),
    [
        (8, math.inf, 7, True),
        (8, math.inf, 8, False),
        (8, math.inf, 9, False),
        (8, 4.0, 3, True),
        (8, 4.0, 4, False),
        (8, 3.5, 3, True),
        (2, 16.0, 2, False),
        (8, 0.0, 1, False),
    ],
)
def test_cores_are_free_where_affinity_and_quota_both_exceed_the_processes(
    monkeypatch: pytest.MonkeyPatch, cores: int, limit: float, processes: int, free: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(spinning, "quota", lambda: limit)
    assert has_free_cores(processes) is free


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, 0.5),
        ("0::/../other\n", {"cpu.max": "400000 100000"}, 4.0),
        (
            "4:cpu,cpuacct:/a\n5:memory:/b\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        (
            "4:cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("nonsense", {}, 0.0),
        ("0::/", {"cpu.max": "many"}, 0.0),
    ],
)
def test_the_quota_is_the_smallest_of_the_groups_that_a_process_is_in(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float
) -> None:
    own = tmp_path / "own"
    own.write_text(groups)
    root = tmp_path / "root"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert quota(own, root) == expected


def test_where_there_are_no_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert quota(tmp_path / "none") == math.inf


def test_spinning_asks_without_waiting_until_something_comes_or_it_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []
    clock = itertools.count(0.0, 15e-6)
    monkeypatch.setattr(spinning, "perf_counter", lambda: next(clock))

    def poll(timeout_s: float) -> list[Any]:
        asked.append(timeout_s)
        return ["event"] if len(asked) == 3 else []

    assert spin(poll) == ["event"]
    assert asked == [0, 0, 0]
    asked = [0.0] * 3  # nothing comes any more
    assert spin(poll) == []
    assert 3 < len(asked) - 3 < 6
