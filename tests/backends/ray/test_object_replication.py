"""Calls of a primary to a standby on another node are taken in its order, however they arrive;
those of an earlier stream are refused.
"""

import asyncio
from collections.abc import Awaitable

import pytest

from distnadam.backends.ray.object_replication import OrderedStream
from distnadam.errors import LaneError


def test_calls_that_overtook_each_other_are_taken_in_their_order() -> None:
    taken: list[int] = []

    async def call(stream: OrderedStream, number: int) -> None:
        await stream.turn(5, number)
        await asyncio.sleep(0)
        taken.append(number)
        stream.done(number)

    async def all_at_once() -> None:
        stream = OrderedStream()
        await asyncio.gather(*[call(stream, number) for number in (3, 1, 0, 4, 2)])

    asyncio.run(all_at_once())
    assert taken == [0, 1, 2, 3, 4]


def test_a_later_stream_or_an_end_refuses_the_calls_that_wait_too() -> None:
    async def refused(call: Awaitable[None]) -> None:
        with pytest.raises(LaneError, match="goes on without this standby"):
            await call

    async def scenario() -> None:
        stream = OrderedStream()
        await stream.turn(5, 0)
        stream.done(0)
        early = asyncio.create_task(stream.turn(5, 2))
        await asyncio.sleep(0)
        await stream.turn(6, 0)
        stream.done(0)
        await refused(early)
        await refused(stream.turn(5, 1))
        assert not stream.end(5), "the end of the earlier stream is not that of the later one"
        await stream.turn(6, 1)
        assert stream.end(6)
        await refused(stream.turn(6, 2))

    asyncio.run(scenario())
