"""A worker's step reads large gradients where their owner has them, if it ends the round: the bits
are those of copies, and what the owner does afterwards, or while others are awaited, is not seen.
"""

import signal
import threading
from types import FrameType
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.gradient_runs import LENT
from distnadam.errors import NonFiniteGradient, StepTimeout
from tests.models import bits

START = {"a": np.ones(2 * LENT + 77, np.float32), "b": np.ones(9, np.float32), "z": np.ones(LENT)}


def gradients(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {path: rng.standard_normal(x.shape).astype(x.dtype) for path, x in START.items()}


def strided(tree: dict[str, Any]) -> dict[str, Any]:
    """The same values in arrays that are not contiguous, so that they are copied."""
    return {path: np.stack([x, x], axis=-1)[..., 0] for path, x in tree.items()}


def after(trees: list[dict[str, Any]], **how: Any) -> list[bytes]:
    """The state after steps whose gradients are copied."""
    with DistNadam(backend="local", **how).build(START) as optimizer, optimizer.worker(0) as worker:
        for tree in trees:
            worker.push(tree).result()
        return bits(optimizer)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of elements that were borrowed, and copied after all."""
    found: list[int] = []
    keep = GradientBuffer.keep

    def counted(buffer: GradientBuffer) -> None:
        found.append(sum(leaf.size for leaf in buffer._lent.values()))
        keep(buffer)

    monkeypatch.setattr(GradientBuffer, "keep", counted)
    return found


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("kernel", ["numpy", "fused"])
def test_the_bits_are_those_of_copies(kernel: str, num_shards: int, copies: list[int]) -> None:
    if kernel == "fused":
        pytest.importorskip("llvmlite")
    how: dict[str, Any] = {"options": Options(kernel=kernel, threads=2), "num_shards": num_shards}
    trees = [gradients(number) for number in range(4)]
    with DistNadam(backend="local", **how).build(START) as optimizer, optimizer.worker(0) as worker:
        worker.pull()
        for tree in [trees[0], strided(trees[1]), *trees[2:]]:
            worker.step(tree)
            for leaf in tree.values():
                leaf[...] = np.nan  # its owner's again
        assert bits(optimizer) == after([gradients(number) for number in range(4)], **how)
    assert copies == []


def test_gradients_that_are_the_parameters_are_copied() -> None:
    with DistNadam(backend="local").build(START) as optimizer, optimizer.worker(0) as worker:
        params = worker.pull()
        seen = [params]
        for _ in range(3):
            seen.append({path: x.copy() for path, x in params.items()})
            params = worker.step(params)
        assert bits(optimizer) == after(seen[1:])


def test_what_is_not_finite_is_refused_and_nothing_is_kept() -> None:
    tree = gradients(0)
    tree["a"][LENT + 1] = np.inf
    with DistNadam(backend="local").build(START) as optimizer, optimizer.worker(0) as worker:
        worker.pull()
        with pytest.raises(NonFiniteGradient, match=rf"'a' .* at index \({LENT + 1},\)"):
            worker.step(tree)
        worker.step(gradients(1))
        assert bits(optimizer) == after([gradients(1)])


def test_the_owner_of_gradients_that_wait_for_another_rank_may_change_them(
    copies: list[int],
) -> None:
    ends = []
    for changes in (False, True):
        with DistNadam(num_workers=2, backend="local").build(START) as optimizer:
            workers = [optimizer.worker(rank) for rank in range(2)]
            for worker in workers:
                worker.pull()
            tree = gradients(0)
            first = threading.Thread(target=workers[0].step, args=(tree,))
            first.start()
            while 0 not in optimizer.shards.backend.transport.hosts[0].shard.rounds.current.pushes:  # type: ignore[attr-defined]
                first.join(0.001)
            if changes:
                for leaf in tree.values():
                    leaf[...] = np.nan
            workers[1].step(gradients(1))
            first.join()
            ends.append(bits(optimizer))
    assert ends[0] == ends[1]
    assert copies == [START["a"].size + START["z"].size] * 2, "rank 0's, never rank 1's"


def test_gradients_of_a_step_that_timed_out_are_not_read_any_more() -> None:
    options = Options(step_timeout_s=0.05)
    with DistNadam(num_workers=2, backend="local", options=options).build(START) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        for worker in workers:
            worker.pull()
        tree = gradients(0)
        with pytest.raises(StepTimeout):
            workers[0].step(tree)
        for leaf in tree.values():
            leaf[...] = np.nan
        workers[1].step(gradients(1))
        assert workers[0].pull()["b"] is not None
        assert workers[0].round == 1
        ended = bits(optimizer)
    with DistNadam(num_workers=2, backend="local").build(START) as optimizer:
        for ticket in [optimizer.worker(rank).push(gradients(rank)) for rank in range(2)]:
            ticket.result()
        assert bits(optimizer) == ended


@pytest.mark.timeout(300, method="thread")  # the alarm is the test's own
@pytest.mark.usefixtures("untraced")
def test_an_interrupt_at_any_moment_leaves_whole_steps_and_no_foreign_bytes() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupts, done = 0, 0
    try:
        with DistNadam(backend="local").build(START) as optimizer:
            worker = optimizer.worker(0)
            worker.pull()
            for turn in range(60):
                tree = gradients(done)
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + 3 * turn))
                    try:
                        worker.step(tree)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0.0)
                except KeyboardInterrupt:
                    interrupts += 1
                    for leaf in tree.values():
                        leaf[...] = np.nan
                done = optimizer.iterations
            ended = bits(optimizer)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 5
    assert ended == after([gradients(number) for number in range(done)])
