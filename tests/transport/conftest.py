"""What several tests of transports share."""

from collections.abc import Iterator

import pytest

from tests.transport.tcp_shards import Shards


@pytest.fixture
def shards() -> Iterator[Shards]:
    """Two shards of another host."""
    shards = Shards()
    yield shards
    shards.close()
