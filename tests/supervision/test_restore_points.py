"""What shards can go back to, and what going back would lose."""

from pathlib import Path

import numpy as np

from distnadam import DistNadam
from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.supervision.restore_points import RestorePoints
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


def save_steps(root: Path, steps: int) -> list[str]:
    """Save after each of so many steps; return the checkpoints' directories."""
    with DistNadam(backend="local").build({"w": PARAMS["float32"]}) as optimizer:
        saved = []
        for _ in range(steps):
            optimizer.apply_gradients({"w": np.ones(SIZE, np.float32)})
            saved.append(optimizer.save(root))
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


def test_first_parameters_are_dropped_where_they_are_not_wanted_or_a_save_is_complete(
    tmp_path: Path,
) -> None:
    points = RestorePoints(None, retain_initial=False)
    points.begin(PARAMS, None)
    assert not points.present
    points = RestorePoints(None, retain_initial=True)
    points.begin(PARAMS, None)
    points.checkpoint_saved(str(tmp_path), points.generation)
    assert points.initial is None and points.directory == str(tmp_path)


def test_a_replacement_is_lost_unless_a_checkpoint_of_its_generation_is_saved() -> None:
    points = RestorePoints("root", retain_initial=True)
    before = points.generation
    points.state_replaced("the learning rate was replaced after round 3")
    assert points.generation > before
    points.checkpoint_saved("elsewhere", before)
    assert points.changed == "the learning rate was replaced after round 3"
    assert points.directory == "root", "a directory that the user named stays"
    points.checkpoint_saved("elsewhere", points.generation)
    assert points.changed is not None, "nobody looks there"
    points.checkpoint_saved("root", before)
    assert points.changed is not None
    points.checkpoint_saved("root", points.generation)
    assert points.changed is None


def test_the_newest_checkpoint_comes_first_and_a_damaged_one_is_passed_over(
    tmp_path: Path,
) -> None:
    first, second = save_steps(tmp_path, 2)
    points = RestorePoints(str(tmp_path), retain_initial=True)
    points.begin(PARAMS, None)
    newest, older, initial = points.candidates()
    assert [str(newest), str(older)] == [second, first]
    assert initial.params is not None
    loads = points.loads(newest, SPECS, Load(epoch=3, config=NadamConfig(lr=0.5)))
    saved = SPECS[0].config
    assert [(load.directory, load.config) for load in loads.values()] == [(second, saved)] * 2
    (Path(second) / "manifest.msgpack").write_bytes(b"damaged")
    assert points.loads(newest, SPECS, Load(epoch=3)) == {}
    assert len(points.loads(older, SPECS, Load(epoch=3))) == 2


def test_a_directory_that_cannot_be_read_leaves_the_first_parameters(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    points = RestorePoints(str(tmp_path / "file"), retain_initial=True)
    points.begin(PARAMS, None)
    assert [str(point) for point in points.candidates()] == ["the first parameters"]
