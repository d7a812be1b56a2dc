"""Workers: who waits for whom, what releases them, and what they refuse to believe."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options, Worker
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import LifecycleError, ShardsDisagree, StepTimeout
from distnadam.hyperparameters import NadamConfig
from distnadam.runtime.shard_host import ShardHost
from tests.models import bits, gradients, params, run
from tests.simulation.backend import WorldBackend, begin_world


def test_a_worker_that_waits_in_vain_names_who_is_missing() -> None:
    with DistNadam(num_workers=3, backend="local", options=Options(step_timeout_s=0.05)).build(
        {"w": np.ones(1)}
    ) as optimizer:
        gone, waits = optimizer.worker(1), optimizer.worker(0)
        gone.close()
        ticket = waits.push({"w": np.ones(1)})
        with pytest.raises(StepTimeout, match=r"still to push: ranks 1 \(closed\), 2"):
            ticket.result()
        others = [optimizer.worker(rank).push({"w": np.ones(1)}) for rank in (1, 2)]
        assert [t.result() for t in (ticket, *others)] == [1, 1, 1]


def test_closing_the_optimizer_releases_a_worker_that_waits() -> None:
    optimizer = DistNadam(num_workers=2, backend="local").build({"w": np.ones(1)})
    ticket = optimizer.worker(0).push({"w": np.ones(1)})
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            ticket.result()
        except LifecycleError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    optimizer.close()
    thread.join()
    assert "closed" in str(errors[0])


@pytest.mark.on_ray
def test_reading_and_saving_in_the_middle_of_training_sees_one_step(
    tmp_path: Any, backend: str
) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend=backend).build(params()) as optimizer:
        trainer = threading.Thread(target=run, args=(optimizer, 0, 40))
        trainer.start()
        seen = [int(optimizer.get_weights()[0]) for _ in range(10)]
        saved = optimizer.save(tmp_path)
        trainer.join()
        assert seen == sorted(seen) and optimizer.iterations == 40
        end = bits(optimizer)
    with DistNadam.restore(saved, backend="local", num_shards=1) as again:
        run(again, again.round, 40)
        assert bits(again) == end


def test_a_learning_rate_that_differs_between_shards_is_noticed() -> None:
    calls = itertools.count()
    with (
        DistNadam(lr=lambda step: 0.001 * next(calls), num_shards=2, backend="local").build(
            params()
        ) as optimizer,
        optimizer.worker(0) as worker,
        pytest.raises(
            ShardsDisagree, match="must give every shard the same rate for the same step"
        ),
    ):
        worker.step(gradients(0, 0))


@pytest.mark.parametrize("way", ["step_at_once", "post"])
@pytest.mark.parametrize("moment", ["before", "between", "waiting"])
def test_a_step_that_was_interrupted_counts_once_on_every_shard(
    moment: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, trees = (
        {"w": np.ones(100, np.float32)},
        [{"w": np.full(100, number, np.float32)} for number in range(1, 4)],
    )
    reached = {"before": 0, "between": 1, "waiting": 2}[moment]
    with (
        DistNadam(num_shards=2, backend="local").build(start) as optimizer,
        optimizer.worker(0) as worker,
    ):
        worker.step(trees[0])
        link, post = worker.session.channel, worker.session.channel.post
        at_once, calls = ShardHost.step_at_once, itertools.count()

        def post_and_interrupt(messages: Any) -> Any:
            post({shard: messages[shard] for shard in range(reached)})
            raise KeyboardInterrupt

        def step_and_interrupt(host: ShardHost, message: Any) -> Any:
            number = next(calls)
            if reached == number:
                raise KeyboardInterrupt
            stepped = at_once(host, message)
            if reached == number + 1 == 2:
                raise KeyboardInterrupt
            return stepped

        with monkeypatch.context() as patch:
            if way == "post":
                patch.setattr(link, "post", post_and_interrupt)
                call: Callable[[Any], Any] = worker.push
            else:
                patch.setattr(ShardHost, "step_at_once", step_and_interrupt)
                call = worker.step
            with pytest.raises(KeyboardInterrupt):
                call(trees[1])
        worker.step(trees[2])
        ends = bits(optimizer)
    with DistNadam(backend="local").build(start) as optimizer:
        for tree in trees:
            optimizer.apply_gradients(tree)
        assert bits(optimizer) == ends


def test_parameters_are_pulled_though_the_round_was_asked_for_first() -> None:
    options = Options(step_timeout_s=5.0, kernel="numpy")
    world, layout = begin_world(
        np.ones(3000, np.float32), NadamConfig(), options, 2, 1, 0, objects=True
    )
    worker = Worker(ShardGroup(WorldBackend(world), layout, options, poll_s=0.0), 0)
    assert worker.round == 0
    assert (worker.parameters()["w"] == 1).all()
