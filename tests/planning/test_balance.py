"""The better cut: it covers the state, never makes the slowest host slower, and gives a slower host
less; and which host is named as slow.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.client.paces import ShardWork, paces
from distnadam.planning.balance import Pace, best_cut, shares_of, slow_hosts

MOST = 10**9


@st.composite
def several(draw: st.DrawFn) -> list[Pace]:
    numbers = st.integers(0, MOST)
    rates = st.none() | st.floats(1e3, 1e12)
    found, first = [], 0
    for host in range(draw(st.integers(1, 6))):
        shards = draw(st.integers(0 if host else 1, 3))
        found.append(
            Pace(
                host=f"host{host}",
                shards=tuple(range(first, first + shards)),
                elements=draw(numbers) if shards else 0,
                step_s=draw(st.none() | st.floats(1e-12, 1e-3)),
                link_bytes_per_s=draw(rates),
                push_bytes=draw(st.sampled_from([0.0, 2.0, 4.0, 8.0])),
                pull_bytes=draw(st.sampled_from([0.0, 2.0, 4.0])),
            )
        )
        first += shards
    return found


@given(hosts=several())
def test_the_better_cut_holds_everything_and_no_host_takes_longer_than_the_slowest_did(
    hosts: list[Pace],
) -> None:
    cut = best_cut(hosts)
    total = sum(each.elements for each in hosts)
    assert sum(cut.after.values()) == total
    assert all(held >= 0 for held in cut.after.values())
    before, after = max(cut.seconds_before.values()), max(cut.seconds_after.values())
    assert after <= before * (1 + 1e-9)
    assert slow_hosts(hosts, 1e-9) is not None
    if total:
        shares = shares_of(hosts, cut.after)
        assert len(shares) == sum(len(each.shards) for each in hosts)
        assert sum(shares) == total and min(shares) >= 0


def three(slow: Pace) -> list[Pace]:
    """Two equal hosts, and one."""
    return [replace(slow, **OF_EACH, host=host, shards=(i,)) for i, host in enumerate("ab")] + [
        replace(slow, host="c", shards=(2,))
    ]


OF_EACH = {"link_bytes_per_s": 1e8, "step_s": 1e-9}
HOST = Pace(host="", elements=10**6, push_bytes=4.0, pull_bytes=4.0, **OF_EACH)  # type: ignore[arg-type]


@given(times=st.floats(2.0, 1e3), more=st.floats(1.1, 10.0))
def test_a_slower_host_gets_no_more_of_the_state(times: float, more: float) -> None:
    held = []
    for factor in (times, times * more):
        slower = replace(HOST, step_s=1e-7 * factor)
        held.append(best_cut(three(slower)).after["c"])
    assert held[1] <= held[0] <= HOST.elements


def test_a_slow_cable_of_a_host_without_a_worker_is_named_and_its_shard_gets_less() -> None:
    alone = replace(HOST, link_bytes_per_s=1e7, push_bytes=0.0, pull_bytes=0.0)
    hosts = [replace(each, push_bytes=4.0, pull_bytes=4.0) for each in three(alone)[:2]] + [
        replace(alone, host="c", shards=(2,))
    ]
    cut = best_cut(hosts)
    # a third, in its 16 bytes an element at a tenth of the speed
    assert cut.seconds_before["c"] == pytest.approx(1.6, rel=0.01)
    assert cut.after["c"] <= HOST.elements / 10
    # the others, each with half, send half of their gradients and get half of the parameters
    assert cut.gain == pytest.approx(1.6 / (2 * 4 * 1.5e6 / 1e8), rel=0.05) and cut.pays
    (slow,) = slow_hosts(hosts, round_s=2.0)
    assert (slow.host, slow.what) == ("c", "cable")
    assert slow.costs_s == pytest.approx(1.6 - 0.16, rel=0.01)
    assert "its cable carries 10 MB/s, the others' 100" in slow.in_words()


def test_no_cut_helps_a_slow_cable_of_a_host_with_its_part_of_the_workers() -> None:
    """It sends gradients as others send it theirs: with less to hold there is more to send."""
    hosts = three(replace(HOST, link_bytes_per_s=1e7))
    cut = best_cut(hosts)
    assert cut.gain == pytest.approx(1.0, rel=0.01) and not cut.pays
    assert [(each.host, each.what) for each in slow_hosts(hosts, round_s=2.0)] == [("c", "cable")]


def test_a_halved_cpu_is_named_with_what_it_costs_and_gets_half_as_much() -> None:
    hosts = [replace(each, link_bytes_per_s=None) for each in three(replace(HOST, step_s=2e-9))]
    (slow,) = slow_hosts(hosts, round_s=2e-3)
    assert (slow.host, slow.what, slow.share) == ("c", "CPU", pytest.approx(0.5))
    assert slow.costs_s == pytest.approx(1e-3)
    after = best_cut(hosts).after
    assert after["c"] == pytest.approx(after["a"] / 2, rel=0.01)


def test_hosts_that_are_nearly_equal_are_neither_named_nor_cut_anew() -> None:
    hosts = three(replace(HOST, link_bytes_per_s=0.8e8, step_s=1.2e-9))
    assert slow_hosts(hosts, round_s=1e-3) == ()
    assert not best_cut(hosts).pays


def test_a_slow_host_that_costs_nearly_nothing_of_a_step_is_not_named() -> None:
    assert slow_hosts(three(replace(HOST, step_s=1e-8)), round_s=1.0) == ()


def work(index: int, host: str, round: int, **seen: object) -> ShardWork:
    about = {"elements": 100, "stepped_s": 0.01 * round, "sent": {}, "received": {}, "links": {}}
    return ShardWork(index=index, host=host, round=round, **{**about, **seen})  # type: ignore[arg-type]


def test_paces_are_what_shards_counted_between_two_looks() -> None:
    then = [work(0, "a", 10), work(1, "b", 10, sent={"a": 5, "c": 7}, received={"c": 1000})]
    now = [
        work(0, "a", 20, links={"b": 5e6, "c": 1e6}),
        work(1, "b", 20, sent={"a": 4005, "c": 7}, received={"c": 5000}, links={"a": 9e6}),
    ]
    a, b, c = paces(then, now)
    assert (a.host, a.shards, a.elements, a.step_s) == ("a", (0,), 100, pytest.approx(1e-4))
    assert (c.shards, c.elements, c.step_s) == ((), 0, None)
    assert (a.link_bytes_per_s, b.link_bytes_per_s, c.link_bytes_per_s) == (9e6, 9e6, 1e6)
    assert a.pull_bytes == pytest.approx(4.0)
    assert c.push_bytes == pytest.approx(4000 / 2000)


@pytest.mark.parametrize(
    "now",
    [
        [work(0, "a", 10)],
        [work(0, "b", 20)],
        [work(0, "a", 20, elements=99)],
        [work(0, "a", 20, stepped_s=0.0)],
        [work(0, "a", 20), work(1, "a", 20)],
        [],
    ],
)
def test_shards_that_stood_still_or_were_replaced_tell_nothing(now: list[ShardWork]) -> None:
    assert paces([work(0, "a", 10)], now) == ()
