"""Workers and shards of one machine, in real processes: views, deaths, hangs, and what happens
where memory is short.
"""

import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from distnadam import DistNadam, Options
from distnadam.errors import (
    LifecycleError,
    NonFiniteGradient,
    Rewound,
    StepTimeout,
    StructureError,
    WorkerLost,
)
from distnadam.protocol.messages import Describe
from tests.models import bits, gradients, leaves, params

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=0)
class Trainer:
    """A worker in a process of its own."""

    def __init__(self, optimizer: DistNadam, rank: int, file_size_limit: int | None = None) -> None:
        if file_size_limit is not None:
            sys.dont_write_bytecode = True  # it would be cut, for all who import it later
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
        self.logged: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("distnadam").addHandler(handler)
        logging.getLogger("distnadam").setLevel(logging.INFO)
        self.rank, self.worker = rank, optimizer.worker(rank)

    def pid(self) -> int:
        self.worker.parameters()
        return os.getpid()

    def fork(self) -> int:
        """Leave a child behind, as a data loader does."""
        child = os.fork()
        if child == 0:
            signal.pause()
        return child

    def train(self, begin: int, end: int, how: str = "trees") -> list[str]:
        for step in range(begin, end):
            tree = gradients(step, self.rank)
            if how == "trees":
                self.worker.step(tree)
            elif how == "views":
                for view, leaf in zip(leaves(self.worker.gradients()), leaves(tree), strict=True):
                    view[...] = leaf
                self.worker.step()
            else:
                for path, leaf in reversed(list(zip(PATHS, leaves(tree), strict=True))):
                    self.worker.push_tensor(path, leaf)
                self.worker.step()
        return self.logged


PATHS = ["dense/bias", "dense/kernel", "half", "layers/0", "layers/1/0", "layers/1/1"]


def local(steps: int) -> list[bytes]:
    with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        for step in range(steps):
            for ticket in [worker.push(gradients(step, worker.rank)) for worker in workers]:
                ticket.result()
        return bits(optimizer)


def build(**how: Any) -> DistNadam:
    return DistNadam(**({"num_shards": 3, "num_workers": 2, "backend": "ray"} | how)).build(
        params()
    )


@pytest.fixture(scope="module")
def lasting(ray_cluster: None, one_process: None) -> Iterator[DistNadam]:
    with build() as optimizer:
        yield optimizer


@pytest.fixture(params=["local", "ray"])
def either(request: pytest.FixtureRequest) -> Iterator[DistNadam]:
    """An optimizer of each backend in turn; Ray's is the one that lasts."""
    if request.param == "ray":
        yield request.getfixturevalue("lasting")
    else:
        with build(backend="local") as optimizer:
            yield optimizer


def test_trees_views_and_single_tensors_give_the_same_bits_and_say_how_they_travel(
    lasting: DistNadam,
) -> None:
    trainers = [Trainer.remote(lasting, rank) for rank in range(2)]
    for begin, how in ((0, "trees"), (5, "views"), (10, "tensors")):
        logged = ray.get([trainer.train.remote(begin, begin + 5, how) for trainer in trainers])
        assert bits(lasting) == local(begin + 5), how
    assert (
        "worker 1: shards [0, 1, 2] by shared memory (same node), shards none by Ray objects"
        in logged[1]
    )


@pytest.mark.nightly
def test_a_worker_with_too_little_memory_falls_back_to_objects_with_one_warning() -> None:
    with build() as optimizer:
        trainers = [Trainer.remote(optimizer, rank, 4096 if rank else None) for rank in range(2)]
        logged = ray.get([trainer.train.remote(0, 5) for trainer in trainers])
        assert bits(optimizer) == local(5)
    warnings = [text for text in logged[1] if "not available" in text]
    assert len(warnings) == 1
    assert "Ray objects are used instead" in warnings[0]
    assert "give the node or container more memory" in warnings[0]


@pytest.mark.nightly
def test_a_workers_death_is_told_to_those_who_wait_for_it_even_if_it_had_forked() -> None:
    with build(options=Options(rejoin_timeout_s=0.0)) as optimizer:
        first, second = (Trainer.remote(optimizer, rank) for rank in range(2))
        ray.get([first.train.remote(0, 2), second.train.remote(0, 2)])
        child = ray.get(second.fork.remote())
        waiting = first.train.remote(2, 3)
        victim = ray.get(second.pid.remote())
        wait_for_push(optimizer, 0)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(RayTaskError) as caught:
            ray.get(waiting)
        os.kill(child, signal.SIGKILL)
        assert isinstance(caught.value.cause, WorkerLost)
        assert "worker 1 died before it pushed for round 3" in str(caught.value.cause)
        successor = Trainer.remote(optimizer, 1)
        ray.get(successor.pid.remote())
        ray.get([first.train.remote(2, 5), successor.train.remote(2, 5)])
        assert bits(optimizer) == local(5)


def wait_for_push(optimizer: DistNadam, rank: int) -> None:
    shards = optimizer.shards
    while any(rank in d.waiting_for for d in (shards.ask({i: Describe()})[i] for i in range(3))):
        pass  # the test's time limit bounds it


@pytest.mark.nightly
def test_a_shard_that_hangs_is_named_after_the_timeout() -> None:
    with build(options=Options(step_timeout_s=2.0)) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        tickets = [worker.push(gradients(0, worker.rank)) for worker in workers]
        assert [ticket.result() for ticket in tickets] == [1, 1]
        pid = ray.get(optimizer.shards.backend.actors[1].about.remote())["pid"]  # type: ignore[attr-defined]
        os.kill(int(pid), signal.SIGSTOP)
        try:
            tickets = [worker.push(gradients(1, worker.rank)) for worker in workers]
            with pytest.raises(
                StepTimeout,
                match="worker 0: round 2 was not decided in 2 s; shards 1 do not answer; still to "
                "push: ranks none",
            ):
                tickets[0].result()
        finally:
            os.kill(int(pid), signal.SIGCONT)
        assert [ticket.result() for ticket in tickets] == [2, 2], "the ticket may be asked again"
        assert bits(optimizer) == local(2)


def test_a_shards_death_is_told_at_once_and_all_go_back() -> None:
    with build() as optimizer:
        worker = optimizer.worker(0)
        ticket = worker.push(gradients(0, 0))
        pid = ray.get(optimizer.shards.backend.actors[2].about.remote())["pid"]  # type: ignore[attr-defined]
        os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(Rewound, match="all shards went back after a death, to round 0"):
            ticket.result()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("transport", "expected"),
    [
        ("auto", "[0, 1, 2, 3] by shared"),
        pytest.param("objects", "none by shared", marks=pytest.mark.nightly),
    ],
)
def test_a_worker_that_learns_by_a_pull_of_other_shards_reaches_those_and_says_so(
    transport: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        build(num_workers=1, name="pulled", options=Options(transport=transport)) as optimizer,
        optimizer.worker(0) as worker,
    ):  # type: ignore[arg-type]
        worker.step(gradients(0, 0))
        DistNadam.connect("pulled").reshard(4)
        caplog.set_level(logging.INFO, "distnadam")
        caplog.clear()  # on a slow machine the start was logged
        worker.pull()
        assert [f"worker 0: shards {expected}" in line for line in caplog.messages] == [True]
        worker.step(gradients(1, 0))
        assert len(caplog.messages) == 1, "the step had nothing to learn"


@pytest.mark.nightly
def test_two_optimizers_side_by_side_do_not_meet() -> None:
    with build() as one, build() as other:
        trainers = [
            Trainer.remote(optimizer, rank) for optimizer in (one, other) for rank in range(2)
        ]
        ray.get(
            [
                trainer.train.remote(0, 3 + 2 * (index // 2))
                for index, trainer in enumerate(trainers)
            ]
        )
        assert bits(one) == local(3)
        assert bits(other) == local(5)


def test_a_worker_that_is_dropped_takes_leave_and_is_not_dead(either: DistNadam) -> None:
    other, before = either.worker(1), either.round
    tickets = [either.worker(0).push(gradients(0, 0)), other.push(gradients(0, 1))]
    assert [ticket.result() for ticket in tickets] == [before + 1] * 2
    del tickets
    waiting = other.push(gradients(1, 1))
    assert either.worker(0).push(gradients(1, 0)).result() == before + 2
    assert waiting.result() == before + 2


@pytest.mark.on_ray
def test_views_are_checked_and_a_bad_one_moves_no_shard(backend: str) -> None:
    with DistNadam(num_shards=3, backend=backend).build(params()) as optimizer:
        before = bits(optimizer)
        worker = optimizer.worker(0)
        views = worker.gradients()
        for view in leaves(views):
            view[...] = 1
        views["dense"]["kernel"][3, 4] = np.nan
        with pytest.raises(
            NonFiniteGradient,
            match=r"worker 0: gradient 'dense/kernel' is not finite.* at index \(3, 4\)",
        ):
            worker.step()
        assert bits(optimizer) == before
        views["dense"]["kernel"][3, 4] = 1
        worker.step()
        assert optimizer.iterations == 1


def test_parameters_are_read_only_and_stay_while_the_round_runs(either: DistNadam) -> None:
    workers = [either.worker(rank) for rank in range(2)]
    seen = workers[0].parameters()
    kept = [np.array(leaf) for leaf in leaves(seen)]
    with pytest.raises(ValueError, match="read-only"):
        seen["dense"]["kernel"][0] = 1
    for ticket in [worker.push(gradients(0, worker.rank)) for worker in workers]:
        ticket.result()
    same = [np.array_equal(old, leaf) for old, leaf in zip(kept, leaves(seen), strict=True)]
    assert all(same), "of the round before"
    now = workers[0].pull()
    assert [np.asarray(x).tobytes() for x in leaves(now)] == [
        np.asarray(x).tobytes() for x in leaves(either.get_params())
    ]


@pytest.mark.on_ray
def test_the_check_may_be_switched_off(backend: str) -> None:
    made = DistNadam(backend=backend, options=Options(check_gradients=False))
    with made.build({"w": np.ones(3, np.float32)}) as optimizer, optimizer.worker(0) as worker:
        assert np.isnan(worker.step({"w": np.array([1, np.nan, 1], np.float32)})["w"]).tolist() == [
            False,
            True,
            False,
        ]


@pytest.mark.on_ray
def test_half_precision_views_move_half_the_bytes(backend: str) -> None:
    with (
        DistNadam(backend=backend).build({"w": np.ones(3000, np.float32)}) as optimizer,
        optimizer.worker(0) as worker,
    ):
        views = worker.gradients("bfloat16")
        views["w"][:] = 0.5
        end = worker.step()["w"].copy()
        assert views["w"].nbytes == 6000
    with DistNadam(backend="local").build({"w": np.ones(3000, np.float32)}) as optimizer:
        optimizer.apply_gradients({"w": np.full(3000, 0.5, np.float32)})
        assert optimizer.get_params()["w"].tobytes() == end.tobytes()


def test_what_is_missing_twice_or_unknown_is_named() -> None:
    with DistNadam(backend="local").build(params()) as optimizer, optimizer.worker(0) as worker:
        with pytest.raises(
            LifecycleError,
            match=r"worker 0: give gradients, or write them into the views of gradients\(\)",
        ):
            worker.step()
        with pytest.raises(
            StructureError, match="'nothing' is not a tensor of the model; expected one of"
        ):
            worker.push_tensor("nothing", np.ones(3, np.float32))
        worker.push_tensor("half", np.ones((40, 50), np.float16))
        with pytest.raises(StructureError, match="'half' was pushed already for this round"):
            worker.push_tensor("half", np.ones((40, 50), np.float16))
        with pytest.raises(
            StructureError,
            match=r"gradients: 'dense/bias': expected shape \(70,\) and a floating-point dtype, "
            r"got shape \(71,\)",
        ):
            worker.push_tensor("dense/bias", np.ones(71, np.float32))
        with pytest.raises(
            StructureError, match=r"'dense/bias' was not pushed for this round \(5 missing\)"
        ):
            worker.step()
        assert optimizer.iterations == 0
        worker.step(gradients(0, 0))
        assert optimizer.iterations == 1
