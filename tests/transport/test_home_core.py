"""A worker and a shard wait on the core that they share, and only while they wait."""

import os
import threading
from collections.abc import Iterator

import pytest

from distnadam.transport import home_core
from distnadam.transport.home_core import HomeCore, partner_first

ALLOWED = os.sched_getaffinity(0)
CORES = sorted(ALLOWED)
several = pytest.mark.skipif(len(CORES) < 2, reason="this process may use one core alone")


@pytest.fixture(autouse=True)
def _allowed_cores_come_back() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, ALLOWED)


def move_to(core: int) -> None:
    """Be on that core, and free to leave it."""
    os.sched_setaffinity(0, {core})
    os.sched_setaffinity(0, ALLOWED)


@pytest.mark.parametrize(
    ("others", "index", "order"),
    [
        ("abc", 0, "abc"),
        ("abc", 1, "bca"),
        ("abc", 2, "cab"),
        ("abc", 3, "abc"),
        ("ab", 5, "ba"),
        ("a", 4, "a"),
        ("", 4, ""),
    ],
)
def test_the_partner_is_waited_for_first_and_all_others_after_it(
    others: str, index: int, order: str
) -> None:
    assert "".join(partner_first(others, index)) == order


@several
@pytest.mark.parametrize("index", range(4))
def test_a_thread_that_is_elsewhere_waits_at_home_and_is_free_after_it(index: int) -> None:
    home = HomeCore(index, len(CORES))
    core = CORES[index % len(CORES)]
    move_to(CORES[(index + 1) % len(CORES)])
    with home:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == ALLOWED


@several
def test_a_thread_that_is_started_after_a_wait_may_run_anywhere() -> None:
    move_to(CORES[1])
    found: list[set[int]] = []
    with HomeCore(0, len(CORES)):
        pass
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert found == [ALLOWED]


@several
def test_what_is_raised_in_a_wait_frees_the_thread() -> None:
    move_to(CORES[1])
    with pytest.raises(KeyboardInterrupt), HomeCore(0, len(CORES)):
        raise KeyboardInterrupt
    assert os.sched_getaffinity(0) == ALLOWED


@several
@pytest.mark.parametrize("pairs", [0, 1, len(CORES) - 1])
def test_a_thread_waits_anywhere_where_a_core_has_no_pair(pairs: int) -> None:
    move_to(CORES[1])
    with HomeCore(0, pairs):
        assert os.sched_getaffinity(0) == ALLOWED


@several
def test_a_home_that_is_not_allowed_any_more_is_left_alone() -> None:
    home = HomeCore(0, len(CORES))
    os.sched_setaffinity(0, {CORES[1]})
    with home:
        assert os.sched_getaffinity(0) == {CORES[1]}
    assert os.sched_getaffinity(0) == {CORES[1]}


@several
def test_a_long_wait_is_followed_by_waits_anywhere_the_more_the_less_staying_has_paid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(home_core, "perf_counter", lambda: now)
    home = HomeCore(0, len(CORES))

    def wait(seconds: float) -> bool:
        """Wait so long; return whether it was at home."""
        nonlocal now
        move_to(CORES[1])
        with home:
            is_home = os.sched_getaffinity(0) != ALLOWED
            now += seconds
        return is_home

    def absence() -> int:
        """Return how many waits go on anywhere until one is at home, which is long again."""
        waits = 0
        while not wait(1.0):
            waits += 1
        return waits

    now = 1.0
    assert all(wait(1e-4) for _ in range(100))
    assert wait(1.0)  # a hundred short waits at home have paid for it
    first = absence()
    assert first > 0
    assert absence() == 2 * first
    assert absence() == 4 * first
    waits = [wait(1e-4) for _ in range(8 * first + 100)]
    assert not any(waits[: 8 * first])
    assert all(waits[8 * first :])
    assert wait(1.0)
    assert absence() == first
