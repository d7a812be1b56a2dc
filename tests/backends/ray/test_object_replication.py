"""Calls of a primary to a standby on another node are taken in its order, however they arrive;
those of an earlier feed are refused.
"""

import asyncio
from collections.abc import Awaitable

import pytest

from distnadam.backends.ray.object_replication import OrderedStream
from distnadam.errors import LaneError


def test_calls_that_overtook_each_other_are_taken_in_their_order() -> None:
    taken: list[int] = []

    async def call(feed: OrderedStream, number: int) -> None:
        await feed.turn(5, number)
        await asyncio.sleep(0)
        taken.append(number)
        feed.done(number)

    async def all_at_once() -> None:
        feed = OrderedStream()
        await asyncio.gather(*[call(feed, number) for number in (3, 1, 0, 4, 2)])

    asyncio.run(all_at_once())
    assert taken == [0, 1, 2, 3, 4]


def test_a_later_feed_and_a_farewell_end_an_earlier_one_for_those_who_wait_too() -> None:
    async def refused(call: Awaitable[None]) -> None:
        with pytest.raises(LaneError, match="goes on without this standby"):
            await call

    async def scenario() -> None:
        feed = OrderedStream()
        await feed.turn(5, 0)
        feed.done(0)
        early = asyncio.create_task(feed.turn(5, 2))
        await asyncio.sleep(0)
        await feed.turn(6, 0)
        feed.done(0)
        await refused(early)
        await refused(feed.turn(5, 1))
        assert not feed.end(5), "a farewell of the earlier feed says nothing of the later one"
        await feed.turn(6, 1)
        assert feed.end(6)
        await refused(feed.turn(6, 2))

    asyncio.run(scenario())
