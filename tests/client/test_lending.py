"""Gradients that a step in this process reads where they lie: the same bits as of copies, and
nothing of what their owner does with them afterwards.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.backends.base import Pending
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.client.gradient_runs import LENT
from distnadam.errors import NonFiniteGradient
from distnadam.protocol.messages import Step
from distnadam.tensors.arrays import empty_flat
from distnadam.tensors.layout import Layout
from tests.models import bits

MODEL = {
    "a": np.ones(LENT + 5000, np.float32),
    "b": np.ones(10, np.float32),
    "c": np.ones((600, 450), np.float32),
    "d": np.ones((), np.float32),
    "e": np.ones(LENT, np.float32),
    "f": np.ones((3, 3), np.float16),
    "z": np.ones((700, 500)),
}


def gradients(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {path: rng.standard_normal(x.shape).astype(x.dtype) for path, x in MODEL.items()}


def apart(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in arrays that are not contiguous, so that they are copied."""
    return {path: np.stack([x, x], axis=-1)[..., 0] for path, x in tree.items()}


def trained(how: dict[str, Any], *, lent: bool) -> list[bytes]:
    with DistNadam(backend="local", **how).build(MODEL) as optimizer:
        for number in range(4):
            tree = gradients(number)
            optimizer.apply_gradients(tree if lent else apart(tree))
        return bits(optimizer)


@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.5}, {"clipvalue": 0.1}], ids=str)
def test_what_is_read_where_it_lies_has_the_bits_of_copies(
    clip: dict[str, Any], kernel: str, num_shards: int
) -> None:
    how = clip | {"options": Options(kernel=kernel, threads=2)}
    expected = trained(how, lent=False)
    assert trained(how | {"num_shards": num_shards}, lent=True) == expected


def buffer_of(layout: Layout) -> GradientBuffer:
    return GradientBuffer(layout, "apply_gradients", empty_flat(layout.sizes))


def test_large_contiguous_tensors_are_lent_and_all_others_copied() -> None:
    layout = Layout.of(MODEL)
    tree = gradients(0)
    tree["c"] = np.asfortranarray(tree["c"])
    buffer = buffer_of(layout)
    assert buffer.borrow(tree, [tree["e"]]) is None
    parts = buffer.parts(layout.cuts(3))
    begins = {tensor.path: (tensor.space, tensor.begin) for tensor in layout.tensors}
    flat = layout.flat(tree, what="these")
    for part, ranges in zip(parts, layout.cuts(3), strict=True):
        for space, (begin, end) in ranges.items():
            assert part[space].size == end - begin
            assert part[space][0 : end - begin].tobytes() == flat[space][begin:end].tobytes()
            for path, leaf in tree.items():
                if begins[path][0] == space and begin <= begins[path][1] < end:
                    offset = begins[path][1] - begin
                    is_lent = np.shares_memory(part[space][offset : offset + 1], leaf)
                    assert is_lent == (path in ("a", "z")), path


@pytest.mark.parametrize("path", ["a", "b", "e", "z"])
def test_what_is_not_finite_is_named_wherever_it_lies(path: str) -> None:
    with DistNadam(backend="local", num_shards=2).build(MODEL) as optimizer:
        before = bits(optimizer)
        tree = gradients(0)
        where = tuple(n - 1 for n in tree[path].shape)
        tree[path][where] = np.nan
        with pytest.raises(NonFiniteGradient, match=f"gradient '{path}' .* index .*: .*nan"):
            optimizer.apply_gradients(tree)
        assert bits(optimizer) == before


def test_parameters_as_gradients_are_copied_since_a_step_writes_them() -> None:
    size = 2 * LENT
    start = {"w": np.linspace(-1, 1, size, dtype=np.float32)}

    def train(copied: bool) -> list[bytes]:
        with (
            DistNadam(backend="local").build(start) as optimizer,
            optimizer.worker(0) as worker,
        ):
            for _ in range(5):
                older = worker.pull()
                worker.step(start)
                optimizer.apply_gradients({"w": older["w"].copy()} if copied else older)
            return bits(optimizer)

    assert train(copied=False) == train(copied=True)


def test_a_step_that_is_left_undecided_reads_nothing_of_what_its_owner_writes_then() -> None:
    started, size = threading.Event(), LENT

    def slowly(step: int) -> float:
        started.set()
        time.sleep(0.3)
        return 0.01

    start = {"w": np.zeros(size, np.float32)}
    tree = {"w": np.linspace(-1, 1, size, dtype=np.float32)}
    with DistNadam(backend="local", lr=0.01).build(start) as whole:
        whole.apply_gradients({"w": tree["w"].copy()})
        expected = whole.get_params()["w"].tobytes()
    with DistNadam(backend="local", lr=slowly).build(start) as optimizer:
        transport = optimizer.shards.backend.transport
        post = transport.post

        class Interrupted(Pending):
            def result(self, timeout_s: float) -> dict[int, Any]:
                raise KeyboardInterrupt

        def by_another_thread(messages: Mapping[int, Any]) -> Pending:
            if not isinstance(next(iter(messages.values())), Step):
                return post(messages)
            threading.Thread(target=post, args=(messages,)).start()
            started.wait()
            return Interrupted()

        transport.post = by_another_thread  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            optimizer.apply_gradients(tree)
        tree["w"][:] = np.nan
        assert optimizer.get_params()["w"].tobytes() == expected
