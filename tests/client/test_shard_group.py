"""All shards as one: reading and writing at one round, and what a handle says of late shards."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from distnadam import waiting
from distnadam.client.building import start_shards
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options, Settings, Topology
from distnadam.errors import IllegalMessage, PushesPending, Rewound, ShardLost, StepTimeout
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import Read
from distnadam.tensors.layout import Layout
from distnadam.worker import Worker
from tests.client.conftest import Said
from tests.simulation.backend import WorldBackend, begin_world

W = np.arange(5000, dtype=np.float32)


def local(num_shards: int = 3, **options: Any) -> ShardGroup:
    topology = Topology(num_shards=num_shards, num_workers=2, backend="local")
    settings = Settings(options=Options(**options), topology=topology)
    layout = Layout.of({"w": W})
    group = start_shards(settings, layout)
    group.load(layout.flat({"w": W}, what="params"))
    return group


def test_a_read_is_the_whole_model_and_a_copy() -> None:
    group = local()
    clock, state = group.read(("params", "v"))
    assert clock == Clock()
    assert np.array_equal(state["params"]["float32"], W)
    assert not state["v"]["float32"].any()
    state["params"]["float32"][:] = 0.0
    assert np.array_equal(group.read(("params",))[1]["params"]["float32"], W)


def test_what_is_filled_in_raises_the_epoch_and_is_read_back_whatever_the_shards() -> None:
    group = local()
    before = group.describe()
    group.fill({"m": {"float32": W / 2}}, Clock(7, 0.5))
    group.reshard(2)
    clock, state = group.read(("m",))
    assert (clock, len(group.ranges)) == (Clock(7, 0.5), 2)
    assert np.array_equal(state["m"]["float32"], W / 2)
    assert group.describe().epoch > before.epoch


def test_a_boundary_that_ends_with_an_error_releases_the_shards() -> None:
    group = local()
    with pytest.raises(KeyError), group.boundary():
        raise KeyError("mine")
    assert all(status.holder is None for status in group.describe_all())
    assert group.step({"w": W}).iterations == 1


def test_a_shard_is_read_only_between_pause_and_resume() -> None:
    group = local()
    with group.boundary() as at:
        assert group.ask({0: Read(at.token, ("m",))})[0].keys() == {"m"}
    with pytest.raises(IllegalMessage):
        group.ask({0: Read(at.token, ("m",))})
    assert group.ask({}) == {}


def test_a_direct_step_is_refused_while_pushes_wait_and_each_later_one_is_another_round() -> None:
    group = local()
    worker = Worker(group, 1)
    ticket = worker.push({"w": W})
    with pytest.raises(PushesPending, match="ranks 1 have pushed for round 1"):
        group.step({"w": W})
    Worker(group, 0).push({"w": W})
    assert ticket.result() == 1
    assert [group.step({"w": W}).round for _ in range(2)] == [2, 3]


def test_late_ranks_and_silent_shards_are_named() -> None:
    group = local()
    Worker(group, 0).push({"w": W})
    assert group.reports.late(0) == "still to push: ranks 1"
    Worker(group, 1).close()
    assert group.reports.late(0) == "still to push: ranks 1 (closed)"
    assert group.reports.late(-1) == "still to push: ranks none"


def test_shards_that_do_not_answer_in_time_are_named() -> None:
    group = local(step_timeout_s=0.05)
    with (
        group.boundary(),
        pytest.raises(StepTimeout, match=r"shards \[0\] did not all answer Pause in 0.05 s"),
        group.boundary(),
    ):
        pass


def test_a_handle_raises_a_rewind_once_and_takes_its_knowledge_along() -> None:
    options = Options(step_timeout_s=0.0, shard_timeout_s=1e-9, kernel="numpy")
    world, layout = begin_world(W, NadamConfig(), options, 2, 1, 0)
    group = ShardGroup(WorldBackend(world), layout, options, poll_s=0.0)
    group.read(("m",))
    world.shards[1].kill()
    with pytest.raises(Rewound, match="to round 0"):
        group.read(("m",))
    group.read(("m",))
    make, arguments = group.__reduce__()
    make(*arguments).read(("m",))
    with pytest.raises(ShardLost, match="cannot be made level"):
        group.go_back("they cannot be made level")


@pytest.mark.parametrize(
    ("what", "call"),
    [
        (
            "reshard to 2 shards, which start and load the state",
            lambda group: group.reshard(2),
        ),
        ("reading params, m", lambda group: group.read(("params", "m"))),
        ("writing m", lambda group: group.fill({"m": {"float32": W}})),
        ("setting lr", lambda group: group.set_config({"lr": 0.5})),
        ("apply_gradients", lambda group: group.step({"w": W})),
    ],
    ids=["reshard", "read", "fill", "set_config", "step"],
)
def test_a_call_that_waits_long_says_that_the_shards_are_held(
    what: str,
    call: Callable[[ShardGroup], object],
    monkeypatch: pytest.MonkeyPatch,
    said: Said,
) -> None:
    group = local()
    with ThreadPoolExecutor(1) as pool:
        with group.boundary():
            monkeypatch.setattr(waiting, "REPORT_WAIT_S", 0.01)
            calling = pool.submit(call, group)
            assert said.wait(60)
        calling.result()
    assert len(said.messages) == 1
    assert said.messages[0].startswith(
        f"{what}: has waited 0.01 s, shards 0, 1, 2 are held between two rounds; it waits on"
    )


def test_what_each_shard_does_is_said_for_a_call_that_waits() -> None:
    options = Options(step_timeout_s=0.0, shard_timeout_s=1e-9, kernel="numpy")
    world, layout = begin_world(W, NadamConfig(), options, 2, 1, 0)
    group = ShardGroup(WorldBackend(world), layout, options, poll_s=0.0)
    assert group.reports.busy() == "shards 0, 1 are collecting pushes"
    world.shards[1].kill()
    assert group.reports.busy() == (
        "shards 0 are collecting pushes; shards 1 cannot be asked (shard 1: is dead)"
    )
