"""How a primary reaches a standby of another node: by TCP, else not, with one warning. No Ray."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.standby_connector import StandbyConnector
from distnadam.config import Options
from distnadam.errors import LaneError
from distnadam.supervision.process_manager import ShardProcess
from tests.transport.test_tcp_replication import Far

STANDBY = ShardProcess(0, None, ProcessAddress("there", pid=1))
PATIENCE_S = 30.0


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.close()


def test_a_standby_that_listens_is_filled_by_tcp(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distnadam")
    connector = StandbyConnector(far.spec, lambda standby, timeout_s: far.receiver.endpoint)
    stream = connector.by_tcp(STANDBY, far.arrays, 0, PATIENCE_S)
    assert stream is not None
    assert far.standby.reached == 0
    stream.close()
    port = far.receiver.endpoint.port
    assert f"shard 0: its standby follows by TCP, at 127.0.0.1 port {port}" in caplog.messages


def test_one_that_cannot_be_reached_is_told_once_with_address_port_and_remedy(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    far.receiver.close()
    endpoint = far.receiver.endpoint
    connector = StandbyConnector(far.spec, lambda standby, timeout_s: endpoint)
    for _ in range(2):
        assert connector.by_tcp(STANDBY, far.arrays, 0, PATIENCE_S) is None
    (warning,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert f"standby of shard 0 cannot be filled at 127.0.0.1 port {endpoint.port}" in (
        warning.getMessage()
    )
    assert "Ray objects are used instead" in warning.getMessage()
    assert "Options(port_range=...)" in warning.getMessage()


def test_one_that_cannot_listen_is_told_too(far: Far, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(standby: ShardProcess, timeout_s: float) -> Any:
        raise LaneError("the standby of shard 0 cannot listen at 127.0.0.1: no port")

    connector = StandbyConnector(far.spec, refuse)
    assert connector.by_tcp(STANDBY, far.arrays, 0, PATIENCE_S) is None
    assert "cannot listen at 127.0.0.1: no port; Ray objects are used" in caplog.text


def test_with_objects_nobody_is_asked_to_listen(far: Far) -> None:
    def ask(standby: ShardProcess, timeout_s: float) -> Any:
        raise AssertionError("it was asked")

    spec = replace(far.spec, options=Options(transport="objects"))
    assert StandbyConnector(spec, ask).by_tcp(STANDBY, far.arrays, 0, PATIENCE_S) is None
