"""Decisions that cannot be executed as they were meant leave shards that go on, or go back."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.client.checkpointing import CheckpointWriter, Saved
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options, Settings, Topology
from distnadam.errors import (
    ClusterError,
    OutOfMemory,
    Rewound,
    ShardLost,
    ShardsDisagree,
    ShardUnavailable,
    StepTimeout,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Describe, Pause, Resume, SetConfig, ShardSpec
from distnadam.protocol.supervisor_messages import Reconfigure
from distnadam.supervision.observer import TOKEN
from distnadam.supervision.process_manager import Move, ShardProcess
from tests.simulation.backend import WorldBackend, begin_world
from tests.simulation.world import Process, World, WorldProcesses

SIZE = 5000
OPTIONS = Options(kernel="numpy", step_timeout_s=0.0, shard_timeout_s=1e-9)
GRADIENT = {"w": np.ones(SIZE, np.float32)}


class Failing(WorldProcesses):
    """Processes of which some cannot be started, filled or promoted."""

    starts = 1000
    moves = True
    promotes = True
    described = 0
    bugs = 0
    pause_error: Exception | None = None
    on_described: Callable[[], None] | None = None

    @override
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        answers = super().ask(targets, messages, timeout_s) if self.on_described else None
        is_look = any(isinstance(message, Describe) for message in messages.values())
        self.described += is_look
        if answers is not None and self.on_described is not None and is_look:
            self.on_described()
            return answers
        if self.pause_error and any(isinstance(each, Pause) for each in messages.values()):
            return dict.fromkeys(messages, self.pause_error)
        return super().ask(targets, messages, timeout_s)

    @override
    def start(
        self,
        spec: ShardSpec,
        *,
        standby: bool,
        near: Sequence[ShardProcess],
        beside: ShardProcess | None = None,
    ) -> ShardProcess:
        if self.bugs:
            self.bugs -= 1
            raise RuntimeError("a bug")
        self.starts -= 1
        if self.starts < 0:
            raise OutOfMemory(f"shard {spec.index}: no memory")
        return super().start(spec, standby=standby, near=near)

    @override
    def move(self, move: Move) -> list[Exception]:
        return super().move(move) if self.moves else [ShardLost("shard 0: died meanwhile")]

    @override
    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        if not self.promotes:
            raise ShardLost("the standby died")
        return super().promote(standby, reconfigure, near=near)


class Scene:
    """Shards in a world whose processes may fail, and a client of them."""

    def __init__(self, replicas: int = 0, num_shards: int = 2) -> None:
        initial = np.ones(SIZE, np.float32)
        self.world: World
        self.world, layout = begin_world(
            initial,
            NadamConfig(),
            OPTIONS,
            num_shards=num_shards,
            num_workers=1,
            replicas=replicas,
        )
        self.processes = Failing(self.world)
        self.world.processes = self.processes
        self.world.supervisor.cluster.processes = self.processes
        for process in self.world.supervisor.cluster.shards:
            self.processes.watch(process)
        self.group = ShardGroup(WorldBackend(self.world), layout, OPTIONS)

    def change(self, shard: Process, config: NadamConfig, revision: int) -> None:
        """Change one shard's hyper-parameters only."""
        token = f"change {shard.number}"
        shard.send(Pause(token)).result(0)
        shard.send(SetConfig(token, config, revision)).result(0)
        shard.send(Resume(token)).result(0)

    def save(self, root: Path) -> str:
        """Save a checkpoint; return its directory."""
        made = Settings(config=NadamConfig(), options=OPTIONS, topology=Topology(num_shards=2))
        saved = Saved(settings=made, data={})
        return CheckpointWriter().save(self.group, LocalDirectory(root), saved)

    def holders(self) -> list[str | None]:
        return [answer.holder for answer in self.group.describe_all()]


def reshard(scene: Scene) -> None:
    """Have the supervisor reshard to three shards, once."""
    done = scene.world.supervisor.reshard(scene.group.layout.cuts(3))
    scene.world.look()
    done.result()


@pytest.mark.parametrize("started", [0, 1, 2])
def test_a_reshard_that_cannot_start_its_shards_leaves_the_present_ones_at_work(
    started: int,
) -> None:
    scene = Scene()
    present = list(scene.world.shards)
    scene.processes.starts = started
    with pytest.raises(OutOfMemory, match=f"shard {started}: no memory"):
        reshard(scene)
    assert scene.holders() == [None, None]
    assert scene.world.shards == present
    others = [each.handle for each in scene.world.all_processes if each.handle not in present]
    assert len(others) == started
    assert not any(other.alive for other in others), "new shards that nobody uses are ended"
    assert scene.group.step(GRADIENT).round == 1


def test_a_reshard_that_cannot_move_the_state_leaves_the_present_shards_at_work() -> None:
    scene = Scene()
    scene.group.step(GRADIENT)
    scene.processes.moves = False
    with pytest.raises(ShardLost, match="died meanwhile"):
        reshard(scene)
    assert scene.holders() == [None, None]
    assert scene.group.step(GRADIENT).round == 2
    scene.processes.moves = True
    scene.group.reshard(3)
    assert len(scene.world.shards) == 3
    assert scene.group.step(GRADIENT).round == 3


def test_a_reshard_waits_for_nobody_who_holds_the_shards() -> None:
    scene = Scene()
    scene.group.ask({0: Pause("somebody")})
    with pytest.raises(ClusterError, match="could not be paused between two rounds"):
        reshard(scene)
    assert scene.holders() == ["somebody", None]


def test_a_standby_takes_over_in_the_pass_that_sees_the_death() -> None:
    scene = Scene(replicas=1)
    scene.group.step(GRADIENT)
    scene.world.shards[1].kill()
    scene.processes.described = 0
    scene.world.supervisor.run_once()
    assert scene.world.supervisor.recoveries["promoted"] == 1
    # before and after the fence, after the promotion, and after a standby was started
    assert scene.processes.described <= 4
    assert [answer.round for answer in scene.group.describe_all()] == [1, 1]


def test_a_shard_that_leaves_its_host_counts_as_no_recovery() -> None:
    scene = Scene(replicas=1)
    scene.group.step(GRADIENT)
    before = scene.world.shards[1]
    scene.world.to_leave.add(before)
    scene.world.look()
    assert not before.alive and scene.world.shards[1].alive
    assert scene.world.supervisor.shard_recoveries == 0
    assert sum(scene.world.supervisor.recoveries.values()) == 0
    assert scene.group.step(GRADIENT).round == 2


def test_where_a_standby_cannot_take_over_all_go_back() -> None:
    scene = Scene(replicas=1)
    scene.group.step(GRADIENT)
    scene.processes.promotes = False
    standby = scene.world.standbys[1]
    scene.world.shards[1].kill()
    scene.world.look()
    assert not standby.alive, "it must not step in any more"
    assert [answer.round for answer in scene.group.describe_all()] == [0, 0]
    assert scene.world.supervisor.recoveries["rewound"] == 1


def test_a_change_that_reached_some_shards_only_is_undone_with_all_that_followed() -> None:
    scene = Scene(num_shards=3)
    scene.group.step(GRADIENT)
    scene.change(scene.world.shards[1], NadamConfig(lr=0.5), 1)
    with pytest.raises(ShardsDisagree, match="a change reached some shards only"):
        scene.group.step(GRADIENT)
    scene.world.look()
    assert scene.world.supervisor.recoveries["rewound"] == 1
    at = scene.group.describe_all()
    assert [(answer.round, answer.config, answer.revision) for answer in at] == [
        (0, NadamConfig(), 0)
    ] * 3


def test_a_standby_that_takes_over_completes_a_change_that_its_primary_missed() -> None:
    scene = Scene(num_shards=3, replicas=1)
    scene.group.step(GRADIENT)
    scene.world.look()
    changed = NadamConfig(lr=0.5)
    scene.change(scene.world.shards[1], changed, 1)
    scene.change(scene.world.shards[2], changed, 1)
    scene.world.shards[0].kill()
    scene.world.look()
    assert scene.world.supervisor.shard_recoveries == 1
    at = scene.group.describe_all()
    assert [(answer.round, answer.config, answer.revision) for answer in at] == [
        (1, changed, 1)
    ] * 3
    assert scene.group.step(GRADIENT).lr == 0.5


def test_a_standby_keeps_a_change_that_the_supervisor_has_not_seen() -> None:
    scene = Scene(replicas=1)
    scene.group.set_config({"lr": 0.5})
    scene.world.look()  # its standbys are filled anew
    scene.world.supervisor.cluster.config = NadamConfig()
    for shard in list(scene.world.shards):
        shard.kill()
    scene.world.look()
    at = scene.group.describe_all()
    assert [(answer.config.lr, answer.revision) for answer in at] == [(0.5, 1)] * 2


def test_a_change_between_two_answers_of_a_look_is_not_taken_for_half_done() -> None:
    scene = Scene()
    first, second = scene.world.shards
    scene.change(first, NadamConfig(lr=0.5), 1)

    def changes() -> None:
        scene.processes.on_described = None
        scene.change(second, NadamConfig(lr=0.5), 1)

    scene.processes.on_described = changes
    scene.world.look()
    assert scene.world.supervisor.recoveries["rewound"] == 0
    assert [answer.revision for answer in scene.group.describe_all()] == [1, 1]


def test_a_successor_releases_what_its_predecessor_paused() -> None:
    scene = Scene()
    scene.group.ask({0: Pause(TOKEN), 1: Pause(TOKEN)})
    assert scene.holders() == [TOKEN, TOKEN]
    scene.world.replace_supervisor()
    scene.world.look()
    assert scene.holders() == [None, None]
    assert scene.group.ask({0: Describe()})[0].round == 0


def test_a_reshard_whose_caller_cancelled_it_is_not_made_and_nothing_fails() -> None:
    scene = Scene()
    done = scene.world.supervisor.reshard(scene.group.layout.cuts(3))
    assert done.cancel()
    scene.world.look()
    assert len(scene.world.shards) == 2
    assert scene.world.supervisor.newest_map.failed is None
    assert scene.group.step(GRADIENT).round == 1


def test_a_reshard_while_a_shard_is_missing_asks_to_try_again() -> None:
    scene = Scene()
    supervisor = scene.world.supervisor
    present = supervisor.cluster.shards
    missing = ShardProcess(1, None, None)
    supervisor.manage([present[0], missing], {}, [missing])
    with pytest.raises(StepTimeout, match="shard 1 is dead and not replaced yet; try again"):
        reshard(scene)
    reshard(scene)  # the look has replaced it
    assert len(scene.world.shards) == 3
    assert scene.group.step(GRADIENT).round == 1


def test_a_standby_whose_start_fails_by_a_bug_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distnadam.supervision.standby_starter._START_AGAIN_S", 0.0)
    scene = Scene(replicas=1)
    scene.processes.bugs = 1
    scene.world.shards[1].kill()  # its standby takes over, and needs another
    scene.world.look()
    assert scene.processes.bugs == 0
    assert scene.world.standbys[1].alive
    assert scene.world.supervisor.newest_map.failed is None


def test_a_reshard_of_a_state_that_was_replaced_says_so() -> None:
    scene = Scene()
    scene.processes.pause_error = Rewound("all shards went back", 4, 7)
    with pytest.raises(Rewound, match="went back"):
        reshard(scene)
    assert scene.holders() == [None, None]


def test_a_successor_that_knows_nothing_goes_back_to_the_checkpoints_hyper_parameters(
    tmp_path: Path,
) -> None:
    scene = Scene()
    scene.group.step(GRADIENT)
    scene.group.set_config({"lr": 0.5, "clipnorm": 1.0})
    scene.save(tmp_path)
    scene.world.replace_supervisor()
    for shard in list(scene.world.shards):
        shard.kill()
    scene.world.look()
    at = scene.group.describe_all()
    assert [(answer.round, answer.config) for answer in at] == [
        (1, NadamConfig(lr=0.5, clipnorm=1.0))
    ] * 2


@pytest.mark.parametrize("several", [False, True], ids=["one shard", "all shards"])
def test_a_successor_knows_what_was_replaced_though_every_shard_died_with_its_predecessor(
    several: bool, tmp_path: Path
) -> None:
    scene = Scene()
    scene.save(tmp_path)
    scene.group.set_config({"lr": 0.5})
    scene.world.replace_supervisor()
    for shard in list(scene.world.shards)[: 2 if several else 1]:
        shard.kill()
    scene.world.look()
    failed = scene.world.supervisor.newest_map.failed
    assert failed is not None and "the configuration was replaced after round 0" in failed


def test_nothing_but_the_optimizers_own_checkpoints_is_gone_back_to(tmp_path: Path) -> None:
    scene, other = Scene(), Scene()
    scene.save(tmp_path)
    for _ in range(3):
        other.group.step(GRADIENT)
    other.save(tmp_path)
    scene.group.step(GRADIENT)
    scene.world.shards[0].kill()
    scene.world.look()
    assert [answer.round for answer in scene.group.describe_all()] == [0, 0]


def test_a_change_that_is_answered_while_all_go_back_is_lost_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene()
    scene.save(tmp_path)
    scene.group.step(GRADIENT)
    points = scene.world.supervisor.restore_points
    loads = points.loads

    def loads_late(*given: Any) -> Any:
        points.replacement_completed(points.replacement_begun("the rate was replaced"))
        return loads(*given)

    monkeypatch.setattr(points, "loads", loads_late)
    scene.world.shards[0].kill()
    scene.world.look()
    failed = scene.world.supervisor.newest_map.failed
    assert failed is not None and failed.endswith("and the rate was replaced meanwhile")


def test_a_change_that_only_begins_while_all_go_back_keeps_them_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene()
    scene.save(tmp_path)
    scene.group.step(GRADIENT)
    points, start = scene.world.supervisor.restore_points, scene.processes.start

    def start_late(*args: Any, **kwargs: Any) -> Any:
        points.replacement_begun("the rate was replaced")
        return start(*args, **kwargs)

    monkeypatch.setattr(scene.processes, "start", start_late)
    scene.world.shards[0].kill()
    scene.world.look()
    assert scene.world.supervisor.newest_map.failed is None
    assert [answer.round for answer in scene.group.describe_all()] == [0, 0]


def test_a_checkpoint_that_cannot_be_read_leaves_none_of_before_a_replacement(
    tmp_path: Path,
) -> None:
    scene = Scene()
    scene.save(tmp_path)
    scene.group.set_config({"lr": 0.5})
    scene.group.step(GRADIENT)
    newest = scene.save(tmp_path)
    (Path(newest) / "manifest.msgpack").write_bytes(b"damaged")
    scene.world.shards[0].kill()
    scene.world.look()
    failed = scene.world.supervisor.newest_map.failed
    assert failed is not None and f"nothing to go back to can be loaded, of {newest}" in failed


@pytest.mark.parametrize("error", [ShardLost("its connection ended"), ShardUnavailable("busy")])
def test_a_change_whose_message_one_shard_lost_is_completed_and_costs_no_round(
    error: Exception,
) -> None:
    scene = Scene()
    for _ in range(2):
        scene.group.step(GRADIENT)
    shard = scene.world.shards[1]
    lost: list[Exception] = [error]

    def send(message: Any) -> Future[Any]:
        if isinstance(message, SetConfig) and lost:
            future: Future[Any] = Future()
            future.set_exception(lost.pop())
            return future
        return Process.send(shard, message)

    shard.send = send  # type: ignore[method-assign]
    assert scene.group.set_config({"lr": 0.5}).lr == 0.5
    scene.world.look()
    answers = list(scene.group.describe_all())
    assert [(each.round, each.config.lr) for each in answers] == [(2, 0.5)] * 2
    assert len({each.revision for each in answers}) == 1
    assert scene.world.supervisor.recoveries["rewound"] == 0
    assert scene.group.step(GRADIENT).round == 3
