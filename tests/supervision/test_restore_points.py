"""What shards can go back to, and what going back would lose."""

from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.supervision.restore_points import RestoreMemory, RestorePoints
from distnadam.tensors.layout import Layout

SIZE = 5000
PARAMS = {"float32": np.linspace(-1, 1, SIZE, dtype=np.float32)}
LAYOUT = Layout.of({"w": PARAMS["float32"]})
SPECS = [
    ShardSpec(
        index=index,
        num_shards=2,
        num_workers=1,
        replicas=0,
        name=None,
        config=NadamConfig(),
        options=Options(),
        layout=LAYOUT,
        ranges=ranges,
    )
    for index, ranges in enumerate(LAYOUT.cuts(2))
]


class Memory(RestoreMemory):
    """Keeps the last record, unless it `is_full`."""

    def __init__(self) -> None:
        self.record: bytes | None = None
        self.is_full = False

    def read(self) -> bytes | None:
        return self.record

    def write(self, record: bytes) -> None:
        if self.is_full:
            raise OSError("full")
        self.record = record


def checkpoint(number: int, root: str = "/root") -> CheckpointId:
    return CheckpointId(f"{root}/step_{number:08d}", f"{number:016x}")


def save_steps(root: Path, steps: int) -> list[CheckpointId]:
    """Save after each of so many steps; return which checkpoints."""
    with DistNadam(backend="local").build({"w": PARAMS["float32"]}) as optimizer:
        saved = []
        for _ in range(steps):
            optimizer.apply_gradients({"w": np.ones(SIZE, np.float32)})
            place = optimizer.save(root)
            saved.append(CheckpointId(place, store.load(place).save_id))
        return saved


def test_without_a_checkpoint_the_first_parameters_are_cut_for_each_shard() -> None:
    points = RestorePoints(None, retain_initial=True)
    assert not points.present and list(points.candidates()) == []
    points.begin(PARAMS, None)
    (point,) = points.candidates()
    assert points.present and str(point) == "the first parameters"
    loads = points.loads(point, SPECS, Load(epoch=7))
    assert [load.epoch for load in loads.values()] == [7, 7]
    parts = [load.params["float32"] for load in loads.values() if load.params is not None]
    assert np.concatenate(parts).tobytes() == PARAMS["float32"].tobytes()


def test_first_parameters_are_dropped_where_they_are_not_wanted_or_a_save_is_complete() -> None:
    points = RestorePoints(None, retain_initial=False)
    points.begin(PARAMS, None)
    assert not points.present
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    points.checkpoint_saved(checkpoint(1), points.generation)
    assert [point.checkpoint for point in points.candidates()] == [checkpoint(1)]


def test_a_replacement_is_lost_unless_a_checkpoint_of_its_generation_is_saved() -> None:
    points = RestorePoints("/root", retain_initial=True)
    points.begin(None, checkpoint(0))
    before = points.generation
    points.replacement_begun("the learning rate was replaced after round 3")
    assert points.generation > before
    points.checkpoint_saved(checkpoint(1), before)
    assert points.changed == "the learning rate was replaced after round 3"
    assert list(points.candidates()) == []
    points.checkpoint_saved(checkpoint(2, "/elsewhere"), points.generation)
    assert points.changed is not None, "nobody looks there"
    points.checkpoint_saved(checkpoint(2), points.generation)
    assert points.changed is None
    assert [point.checkpoint for point in points.candidates()] == [checkpoint(2)]


def test_a_save_that_ends_late_is_behind_one_of_a_later_state() -> None:
    points = RestorePoints(None, retain_initial=True)
    before = points.generation
    points.replacement_begun("the state was replaced after round 3")
    points.checkpoint_saved(checkpoint(2), points.generation)
    points.checkpoint_saved(checkpoint(1), before)
    assert points.changed is None
    assert [point.checkpoint for point in points.candidates()] == [checkpoint(2)]


def test_what_was_never_answered_may_be_undone_but_nothing_before_it() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    points.replacement_begun("the first")
    assert (points.changed, points.changed_before) == ("the first", None)
    (initial,) = points.candidates(undoing=True)
    points.gone_back(initial)
    assert (points.changed, points.changed_before) == (None, None)
    points.replacement_begun("the second")
    points.replacement_answered()
    assert (points.changed, points.changed_before) == ("the second", "the second")
    points.replacement_begun("the third")
    points.replacement_begun("the third")  # its author tries again
    assert (points.changed, points.changed_before) == ("the third", "the second")
    assert list(points.candidates(undoing=True)) == []


def test_a_second_save_of_a_round_takes_the_place_of_the_first(tmp_path: Path) -> None:
    points = RestorePoints(None, retain_initial=True)
    (first,) = save_steps(tmp_path, 1)
    (second,) = save_steps(tmp_path, 1)
    points.begin(None, first)
    (point,) = points.candidates()
    assert points.loads(point, SPECS, Load(epoch=3)) == {}, "another lies there"
    points.checkpoint_saved(second, points.generation)
    (point,) = points.candidates()
    assert len(points.loads(point, SPECS, Load(epoch=3))) == 2


def test_the_newest_checkpoint_comes_first_and_a_damaged_one_is_passed_over(
    tmp_path: Path,
) -> None:
    first, second = save_steps(tmp_path, 2)
    points = RestorePoints(str(tmp_path), retain_initial=True)
    points.begin(PARAMS, None)
    for each in (first, second):
        points.checkpoint_saved(each, points.generation)
    newest, older = points.candidates()
    assert [str(newest), str(older)] == [second.place, first.place]
    loads = points.loads(newest, SPECS, Load(epoch=3, config=NadamConfig(lr=0.5)))
    saved = SPECS[0].config
    assert [(load.directory, load.config) for load in loads.values()] == [(second.place, saved)] * 2
    (Path(second.place) / "manifest.msgpack").write_bytes(b"damaged")
    assert points.loads(newest, SPECS, Load(epoch=3)) == {}
    assert len(points.loads(older, SPECS, Load(epoch=3))) == 2


def test_checkpoints_that_are_not_the_optimizers_own_are_none(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    points = RestorePoints(str(tmp_path), retain_initial=True)
    assert not points.present
    points.begin(PARAMS, None)
    assert [str(point) for point in points.candidates()] == ["the first parameters"]


def test_a_successor_knows_all_but_the_first_parameters() -> None:
    memory = Memory()
    points = RestorePoints(None, retain_initial=True, memory=memory)
    points.begin(PARAMS, None)
    points.replacement_begun("the first")
    points.replacement_answered()
    for number in range(100):
        points.checkpoint_saved(checkpoint(number), points.generation)
    points.replacement_begun("the second")
    heir = RestorePoints(None, retain_initial=True, memory=memory)
    heir.begin(None, None)
    for each in (points, heir):
        assert (each.generation, each.present) == (points.generation, True)
        assert (each.changed, each.changed_before) == ("the second", None)
        (newest, *others) = each.candidates(undoing=True)
        assert newest.checkpoint == checkpoint(99) and len(others) == 63


def test_what_the_memory_does_not_take_has_not_begun() -> None:
    memory = Memory()
    points = RestorePoints(None, retain_initial=True, memory=memory)
    points.begin(PARAMS, None)
    memory.is_full = True
    with pytest.raises(OSError, match="full"):
        points.replacement_begun("the state was replaced")
    assert points.changed is None and points.generation == 0
