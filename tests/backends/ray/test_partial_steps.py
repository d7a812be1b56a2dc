"""A direct step that reached some shards only, since a call was lost or its caller died."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.backends.base import Pending
from distnadam.errors import Rewound, ShardUnavailable
from distnadam.protocol.messages import Step, StepNorms
from tests.models import bits

pytestmark = pytest.mark.usefixtures("ray_cluster")

START = {"w": np.linspace(-1, 1, 3000, dtype=np.float32)}
OPTIONS = Options(shard_timeout_s=2.0, step_timeout_s=20.0)


class Failing(Pending):
    """Answers that come, and are not heard."""

    def __init__(self, pending: Pending, error: BaseException) -> None:
        self._pending, self._error = pending, error

    def result(self, timeout_s: float) -> dict[int, Any]:
        self._pending.result(timeout_s)
        raise self._error


def gradient(number: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(number).standard_normal(3000).astype(np.float32)}


def lose(
    optimizer: DistNadam, kind: type, reached: Callable[[int], bool], error: BaseException
) -> list[list[int]]:
    """Have the next message of a kind reach some shards only, and its caller hear an error; return
    where it says whom it did not reach.
    """
    transport, lost = optimizer.shards.backend.transport, list[list[int]]()
    post = transport.post

    def lossy(messages: Mapping[int, Any]) -> Pending:
        if lost or not isinstance(next(iter(messages.values())), kind):
            return post(messages)
        lost.append([index for index in messages if not reached(index)])
        return Failing(
            post({index: message for index, message in messages.items() if reached(index)}), error
        )

    transport.post = lossy  # type: ignore[method-assign]
    return lost


def undisturbed(steps: int, **how: Any) -> list[bytes]:
    with DistNadam(backend="local", **how).build(START) as optimizer:
        for number in range(steps):
            optimizer.apply_gradients(gradient(number))
        return bits(optimizer)


@pytest.mark.parametrize("clipnorm", [None, pytest.param(0.5, marks=pytest.mark.nightly)])
def test_a_step_whose_call_was_lost_on_some_shards_is_given_them_again(
    clipnorm: float | None,
) -> None:
    cases: list[set[int]] = [{0}, {1, 2}, set(), {0, 1, 2}]
    with DistNadam(num_shards=3, clipnorm=clipnorm, backend="ray", options=OPTIONS).build(
        START
    ) as optimizer:
        post = optimizer.shards.backend.transport.post
        for step, reached in enumerate(cases):
            lost = lose(
                optimizer,
                StepNorms if clipnorm else Step,
                reached.__contains__,
                ShardUnavailable("shard 9: lost by this test"),
            )
            assert optimizer.apply_gradients(gradient(2 * step)) == 2 * step + 1
            assert lost == [[index for index in range(3) if index not in reached]]
            optimizer.shards.backend.transport.post = post  # type: ignore[method-assign]
            assert optimizer.apply_gradients(gradient(2 * step + 1)) == 2 * step + 2
            assert bits(optimizer) == undisturbed(2 * step + 2, clipnorm=clipnorm), reached


@pytest.mark.nightly
def test_a_step_that_nobody_brings_to_an_end_is_undone_everywhere() -> None:
    options = replace(OPTIONS, shard_timeout_s=15.0, step_timeout_s=40.0)  # on a busy machine too
    with DistNadam(num_shards=3, backend="ray", options=options).build(START) as optimizer:
        lost = lose(optimizer, Step, lambda index: index == 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            optimizer.apply_gradients(gradient(0))
        assert lost == [[0, 2]]
        with pytest.raises(Rewound, match="to round 0"):
            optimizer.apply_gradients(gradient(0))
        assert optimizer.apply_gradients(gradient(0)) == 1
        assert bits(optimizer) == undisturbed(1)
