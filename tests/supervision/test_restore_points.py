"""What shards can go back to, and what going back would lose."""

from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.config import Options
from distnadam.errors import CheckpointError, ClusterError, StaleEpoch
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
            raise ClusterError("full")
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


def save(points: RestorePoints, which: CheckpointId, taken: int | None = None) -> None:
    """Tell of a whole checkpoint of the present state, or of that of then."""
    taken = points.snapshot_taken() if taken is None else taken
    for is_whole in (False, True):
        points.checkpoint_written(which, taken, is_whole=is_whole)


def replace(points: RestorePoints, what: str) -> None:
    points.replacement_completed(points.replacement_begun(what))


def listed(points: RestorePoints, *, undoing: bool = False) -> list[CheckpointId | None]:
    return [point.checkpoint for point in points.known.candidates(undoing=undoing)]


def lost(points: RestorePoints) -> tuple[str | None, str | None]:
    return points.known.would_lose, points.known.undoing_would_lose


def test_without_a_checkpoint_the_first_parameters_are_cut_for_each_shard() -> None:
    points = RestorePoints(None, retain_initial=True)
    assert points.known.points == ()
    points.begin(PARAMS, None)
    (point,) = points.known.candidates()
    assert str(point) == "the first parameters"
    loads = points.loads(point, SPECS, Load(epoch=7))
    assert [load.epoch for load in loads.values()] == [7, 7]
    parts = [load.params["float32"] for load in loads.values() if load.params is not None]
    assert np.concatenate(parts).tobytes() == PARAMS["float32"].tobytes()


def test_first_parameters_are_dropped_where_they_are_not_wanted_or_a_save_is_complete() -> None:
    points = RestorePoints(None, retain_initial=False)
    points.begin(PARAMS, None)
    assert points.known.points == ()
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    save(points, checkpoint(1))
    assert listed(points) == [checkpoint(1)]


def test_a_replacement_is_lost_unless_a_whole_checkpoint_was_taken_after_it() -> None:
    points = RestorePoints("/root", retain_initial=True)
    points.begin(None, checkpoint(0))
    before = points.snapshot_taken()
    replace(points, "the learning rate was replaced after round 3")
    save(points, checkpoint(1), before)
    assert lost(points)[0] == "the learning rate was replaced after round 3"
    assert listed(points) == []
    save(points, checkpoint(2, "/elsewhere"))
    assert lost(points)[0] is not None, "nobody looks there"
    taken = points.snapshot_taken()
    points.checkpoint_written(checkpoint(2), taken, is_whole=False)
    assert lost(points)[0] is not None and listed(points) == [checkpoint(2)]
    points.checkpoint_written(checkpoint(2), taken, is_whole=True)
    points.checkpoint_written(checkpoint(2), taken, is_whole=False)  # told late, once more
    assert lost(points) == (None, None) and listed(points) == [checkpoint(2)]


def test_what_was_taken_later_is_better_whichever_was_told_first() -> None:
    points = RestorePoints(None, retain_initial=True)
    early, late = points.snapshot_taken(), points.snapshot_taken()
    save(points, checkpoint(5), late)
    save(points, checkpoint(2), early)
    assert listed(points) == [checkpoint(5), checkpoint(2)]


def test_what_is_half_done_may_be_undone_but_nothing_before_it() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    points.replacement_begun("the first")
    save(points, checkpoint(1))  # of a state that is half one, half the other
    assert lost(points) == (None, None) and listed(points) == [checkpoint(1)]
    assert listed(points, undoing=True) == []
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    points.replacement_begun("the first")
    assert lost(points) == ("the first", None)
    (initial,) = points.known.candidates(undoing=True)
    assert points.gone_back(initial) is None
    assert lost(points) == (None, None)
    replace(points, "the second")
    assert lost(points) == ("the second", "the second")
    points.replacement_begun("the third")
    points.replacement_begun("the third")  # its author tries again
    assert lost(points) == ("the third", "the second")
    assert listed(points, undoing=True) == []


def test_what_was_undone_is_not_answered() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    begun = points.replacement_begun("the first")
    (initial,) = points.known.candidates(undoing=True)
    points.gone_back(initial)
    with pytest.raises(StaleEpoch, match="went back"):
        points.replacement_completed(begun)


def test_what_is_completed_between_the_decision_to_go_back_and_its_end_is_said_to_be_lost() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    points.replacement_begun("the first")
    (initial,) = points.known.candidates(undoing=True)
    replace(points, "the second")
    assert points.gone_back(initial) == "the second"
    assert lost(points)[0] == "the second"


def test_what_is_not_completed_when_all_have_gone_back_never_will_be() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    (initial,) = points.known.candidates()
    begun = points.replacement_begun("the first")  # once it was decided
    assert points.gone_back(initial) is None
    assert lost(points) == (None, None)
    with pytest.raises(StaleEpoch, match="went back"):
        points.replacement_completed(begun)


def test_what_a_point_holds_is_not_lost_by_going_back_to_it() -> None:
    points = RestorePoints(None, retain_initial=True)
    begun = points.replacement_begun("the first")
    save(points, checkpoint(1))
    (point,) = points.known.candidates()
    points.replacement_completed(begun)
    assert points.gone_back(point) is None
    assert lost(points) == (None, None) and listed(points) == [checkpoint(1)]


def test_a_snapshot_between_two_half_done_replacements_is_no_state_to_go_back_to() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(None, checkpoint(0))
    points.replacement_begun("the first")
    save(points, checkpoint(1))
    points.replacement_begun("the first")
    assert listed(points, undoing=True) == [checkpoint(0)]


def test_what_was_taken_before_all_went_back_is_none_afterwards() -> None:
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    save(points, checkpoint(1))
    late = points.snapshot_taken()
    save(points, checkpoint(3))
    points.gone_back(points.known.candidates()[1])
    assert listed(points) == [checkpoint(1)]
    with pytest.raises(CheckpointError, match="all shards went back since then"):
        points.checkpoint_written(checkpoint(2), late, is_whole=False)
    points.checkpoint_written(checkpoint(2), late, is_whole=True)
    assert listed(points) == [checkpoint(1)]
    save(points, checkpoint(4))
    assert listed(points) == [checkpoint(4), checkpoint(1)]


def test_a_second_save_of_a_round_takes_the_place_of_the_first(tmp_path: Path) -> None:
    points = RestorePoints(None, retain_initial=True)
    (first,) = save_steps(tmp_path, 1)
    save(points, first)
    taken = points.snapshot_taken()
    (second,) = save_steps(tmp_path, 1)
    (point,) = points.known.candidates()
    assert points.loads(point, SPECS, Load(epoch=3)) == {}, "another lies there"
    points.checkpoint_written(second, taken, is_whole=False)
    newest, _older = points.known.candidates()
    assert len(points.loads(newest, SPECS, Load(epoch=3))) == 2
    points.checkpoint_written(second, taken, is_whole=True)
    points.checkpoint_written(first, taken - 1, is_whole=True)  # told late, once more
    assert points.known.candidates()[0].checkpoint == second


def test_the_newest_checkpoint_comes_first_and_a_damaged_one_is_passed_over(
    tmp_path: Path,
) -> None:
    first, second = save_steps(tmp_path, 2)
    points = RestorePoints(str(tmp_path), retain_initial=True)
    points.begin(PARAMS, None)
    for each in (first, second):
        save(points, each)
    newest, older = points.known.candidates()
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
    assert points.known.points == ()
    points.begin(PARAMS, None)
    assert [str(point) for point in points.known.candidates()] == ["the first parameters"]


def test_a_successor_knows_all_but_the_first_parameters() -> None:
    memory = Memory()
    points = RestorePoints(None, retain_initial=True, memory=memory)
    points.begin(PARAMS, None)
    replace(points, "the first")
    for number in range(100):
        save(points, checkpoint(number))
    points.replacement_begun("the second")
    heir = RestorePoints(None, retain_initial=True, memory=memory)
    heir.begin(None, None)
    for each in (points, heir):
        assert lost(each) == ("the second", None)
        assert listed(each, undoing=True) == [checkpoint(number) for number in range(99, 35, -1)]
    assert heir.snapshot_taken() == points.snapshot_taken()


def test_what_the_memory_does_not_take_has_not_begun_but_what_was_done_is_known() -> None:
    memory = Memory()
    points = RestorePoints(None, retain_initial=True, memory=memory)
    points.begin(PARAMS, None)
    points.replacement_begun("the first")
    memory.is_full = True
    with pytest.raises(ClusterError, match="full"):
        points.replacement_begun("the second")
    assert lost(points)[0] == "the first"
    (initial,) = points.known.candidates(undoing=True)
    assert points.gone_back(initial) is None
    assert lost(points) == (None, None)
