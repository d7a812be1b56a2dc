"""Files that need no framework round-trip to the bit; differing formulas are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, schedules
from distnadam.checkpoint import store
from distnadam.checkpoint.diff import compare
from distnadam.errors import CheckpointError, ConfigError, ConversionError, StructureError
from distnadam.interop import (
    Format,
    export_checkpoint,
    import_checkpoint,
    keras,
    load_checkpoint,
    optax,
)
from tests import models

GOLDEN = Path(__file__).parent.parent / "golden"
NO_FRAMEWORK: list[Format] = ["keras", "keras3", "optax", "safetensors", "numpy"]
FITTING: dict[Format, dict[str, Any]] = {
    "keras3": {"schedule_decay": 1.0},
    "optax": {"formula": "nadam_optax"},
}


def saved(root: Path, *, steps: int = 3, **config: Any) -> Path:
    with DistNadam(**config, num_shards=3, backend="local").build(models.params()) as optimizer:
        for step in range(steps):
            optimizer.apply_gradients(models.gradients(step, 0))
        return Path(optimizer.save(root))


@pytest.mark.parametrize("name", NO_FRAMEWORK)
@pytest.mark.parametrize("steps", [0, 3])
def test_there_and_back_is_the_same_checkpoint(name: Format, steps: int, tmp_path: Path) -> None:
    before = saved(tmp_path / "a", steps=steps, **FITTING.get(name, {}))
    done = export_checkpoint(tmp_path / "a", tmp_path / "file", to=name)
    back = import_checkpoint(done.path, tmp_path / "b", source_format=name)
    found = compare(before, Path(back.path))
    assert found.tensors == found.structure == ()
    exact = name in ("safetensors", "numpy")
    rounded = set() if exact else {"config.lr", "m_schedule"}  # float32 in Keras 3's variables
    assert set(found.settings) <= rounded
    for given, expected in found.settings.values():
        assert given == pytest.approx(expected, rel=1e-7)
    assert store.verify(Path(back.path)).iterations == steps
    with DistNadam.restore(back.path, num_shards=2, backend="local") as optimizer:
        optimizer.apply_gradients(models.gradients(steps, 0))
        assert optimizer.iterations == steps + 1
        assert optimizer.get_params()["half"].dtype == np.float16


@pytest.mark.parametrize("name", ["safetensors", "numpy"])
def test_a_schedule_and_clipping_are_kept_where_the_file_is_our_own(
    name: Format, tmp_path: Path
) -> None:
    config = {"lr": schedules.WarmupCosine(0.1, 2, 9), "clipnorm": 1.0, "clipvalue": 0.5}
    before = saved(tmp_path / "a", **config)
    export_checkpoint(before, tmp_path / "file", to=name)
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=name)
    assert back.notes == ()
    assert compare(before, Path(back.path)).same


@pytest.mark.parametrize("name", ["safetensors", "numpy"])
def test_parameters_alone_have_their_own_names_and_dtypes_and_start_at_step_0(
    name: Format, tmp_path: Path
) -> None:
    done = export_checkpoint(saved(tmp_path / "a"), tmp_path / "file", to=name, slots=False)
    back = import_checkpoint(done.path, tmp_path / "b", source_format=name, config={"lr": 0.5})
    assert "starts at step 0" in back.notes[0]
    state = load_checkpoint(Path(back.path))
    assert {t.path: t.dtype for t in state.layout.tensors}["half"] == "float16"
    assert (state.clock.iterations, state.config.lr) == (0, 0.5)
    assert not any(moment.any() for moment in (*state.m, *state.v))


def test_a_safetensors_reader_opens_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    params = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(2)}
    with DistNadam(backend="local").build(params) as optimizer:
        optimizer.save(tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "alone", to="safetensors", slots=False)
    export_checkpoint(tmp_path / "a", tmp_path / "whole", to="safetensors")
    alone, whole = load_file(tmp_path / "alone"), load_file(tmp_path / "whole")
    assert np.array_equal(alone["w"], params["w"])
    assert alone["b"].dtype == np.float64
    assert sorted(whole) == ["m/b", "m/w", "params/b", "params/w", "v/b", "v/w"]


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_an_export_holds_the_references_weights_and_its_own_are_taken(
    case: str, tmp_path: Path
) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        golden = dict(data)
    weights = [golden[f"weights_{i:02d}"] for i in range(10)]
    settings = json.loads(str(golden["get_config"]))
    params = [golden[f"param0_{i}"] for i in range(4)]
    with DistNadam(**json.loads(str(golden["config"])), backend="local").build(params) as optimizer:
        for step in range(len(golden["grads_0"])):
            optimizer.apply_gradients([golden[f"grads_{i}"][step] for i in range(4)])
        ours = keras.weights(load_checkpoint(Path(optimizer.save(tmp_path / "ours"))))
    for given, expected in zip(ours, weights, strict=True):
        assert np.abs(given - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1e-30)

    entries = {f"params/{i}": golden[f"params_{i}"][-1] for i in range(4)}
    np.savez(
        tmp_path / "theirs.npz",
        **entries,
        **{f"optimizer/{i:05d}": weight for i, weight in enumerate(weights)},
    )
    back = import_checkpoint(
        tmp_path / "theirs.npz", tmp_path / "back", source_format="keras", config=settings
    )
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            keras.weights(load_checkpoint(Path(back.path)))[2:], weights[2:], strict=True
        )
    )


def test_the_other_optimizers_order_is_followed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    order = ["layers/1/0", "half", "layers/0", "dense/kernel", "layers/1/1", "dense/bias"]
    export_checkpoint(path, tmp_path / "file", to="keras", order=order)
    with np.load(tmp_path / "file") as data:
        assert data["optimizer/00003"].shape == (40, 50)
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format="keras")
    assert not compare(path, Path(back.path)).tensors
    for wrong in (order[1:], [*order, "half"], [*order[1:], "other"]):
        with pytest.raises(StructureError, match="expected each of the 6 tensors once"):
            export_checkpoint(path, tmp_path / "file", to="keras", order=wrong)


TWO_LAYERS = [f"{layer}.{kind}" for layer in ("norm", "after") for kind in ("weight", "bias")]


def two_layers(root: Path, **config: Any) -> Path:
    """Save what was built in the order of a module's parameters, by which all have one shape."""
    params = {name: np.ones(5, np.float32) for name in TWO_LAYERS}
    with DistNadam(**config, num_shards=2, backend="local").build(params) as optimizer:
        optimizer.apply_gradients({n: np.full(5, i + 1.0) for i, n in enumerate(TWO_LAYERS)})
        return Path(optimizer.save(root))


@pytest.mark.parametrize(
    ("to", "entries"),
    [
        ("keras", [f"optimizer/{i:05d}" for i in (2, 3, 4, 5)]),
        ("keras3", [f"optimizer/{i:05d}" for i in (2, 4, 6, 8)]),
        ("optax", [f"mu/{name}" for name in TWO_LAYERS]),
    ],
)
def test_without_an_order_the_one_given_to_build_is_followed(
    to: Format, entries: list[str], tmp_path: Path
) -> None:
    path = two_layers(tmp_path / "a", **FITTING.get(to, {}))
    export_checkpoint(path, tmp_path / "file", to=to)
    with np.load(tmp_path / "file") as data:
        names = [name.removeprefix("params/") for name in data if name.startswith("params/")]
        given = [name for name in data if name in entries]
        means = [data[name].mean() for name in entries]
    assert given == entries
    assert np.allclose(means, [0.1, 0.2, 0.3, 0.4])
    assert names == TWO_LAYERS
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=to)
    assert compare(path, Path(back.path)).tensors == ()
    again = load_checkpoint(back.path)
    assert [again.names[i] for i in again.positions(None)] == TWO_LAYERS


def test_the_order_given_to_build_outlives_restores_reshards_and_imports(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "a")
    with DistNadam.restore(path, num_shards=3, backend="local") as optimizer:
        optimizer.reshard(1)
        assert list(optimizer.get_params()) == TWO_LAYERS
        later = load_checkpoint(optimizer.save(tmp_path / "b"))
        by_position = [m.mean() for m in keras.weights(later)[2:6]]
        assert np.allclose(by_position, [0.1, 0.2, 0.3, 0.4])
        sorted_by_name = [m.mean() for m in optimizer.get_weights()[2:6]]
        assert np.allclose(sorted_by_name, [0.4, 0.3, 0.2, 0.1])
    without_layout = {
        **{f"params/{name}": np.ones(5, np.float32) for name in TWO_LAYERS},
        **{f"optimizer/{i:05d}": weight for i, weight in enumerate(keras.weights(later))},
    }
    np.savez(tmp_path / "theirs.npz", **without_layout)
    back = import_checkpoint(
        tmp_path / "theirs.npz", tmp_path / "c", source_format="keras", config={"lr": 0.1}
    )
    state = load_checkpoint(back.path)
    assert [state.names[i] for i in state.positions(None)] == TWO_LAYERS
    assert np.allclose([m.mean() for m in keras.weights(state)[2:6]], by_position)


@pytest.mark.parametrize("name", ["keras3", "optax"])
def test_another_momentum_schedule_is_refused_by_name_unless_asked_for(
    name: Format, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a", lr=0.25)
    with pytest.raises(
        ConversionError,
        match=r"momentum schedule: schedule_decay is 0\.004 here, and .*; the coefficient of step "
        r"4 is 0\.45",
    ):
        export_checkpoint(path, tmp_path / "file", to=name)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    done = export_checkpoint(path, tmp_path / "file", to=name, lossy=True)
    assert done.notes[0].startswith("differs: momentum schedule")


def test_the_variables_in_memory_are_refused_alike(tmp_path: Path) -> None:
    state = load_checkpoint(saved(tmp_path / "a"))
    with pytest.raises(ConversionError, match="momentum schedule: schedule_decay"):
        keras.variables(state)
    assert len(keras.variables(state, lossy=True)) == 3 + 2 * 6
    with pytest.raises(ConversionError, match=r"optax\.nadam: momentum schedule"):
        optax.opt_state(state, None)


@pytest.mark.parametrize("name", ["keras3", "optax"])
def test_a_schedule_that_has_run_its_course_is_no_difference(name: Format, tmp_path: Path) -> None:
    with DistNadam(backend="local").build(models.params()) as optimizer:
        _, _, *moments = optimizer.get_weights()
        optimizer.set_weights([np.int64(200_000), np.float64(0.0), *moments])
        optimizer.save(tmp_path / "a")
    assert (
        export_checkpoint(tmp_path / "a", tmp_path / "file", to=name)
        .notes[0]
        .startswith("half precision: 'half'")
    )


@pytest.mark.parametrize(
    ("to", "config", "message"),
    [
        ("optax", {"clipnorm": 1.0}, "clipnorm: 1 does not carry over"),
        (
            "optax",
            {"lr": schedules.Constant(0.5)},
            "learning rate: Constant(rate=0.5) does not carry over; optax.nadam gets its rate",
        ),
        ("keras", {"global_clipnorm": 2.0}, "global_clipnorm: 2 does not carry over"),
        ("keras", {}, "half precision: 'half': given as float32 masters"),
    ],
)
def test_what_frameworks_keep_outside_the_state_is_noted(
    to: Format, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    done = export_checkpoint(
        saved(tmp_path / "a", **{**FITTING.get(to, {}), **config}), tmp_path / "file", to=to
    )
    assert any(note.startswith(message) for note in done.notes), done.notes


def test_two_clippings_are_more_than_keras_3_takes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", schedule_decay=1.0, clipnorm=1.0, clipvalue=1.0)
    with pytest.raises(ConversionError, match="clipnorm and clipvalue are both set here"):
        export_checkpoint(path, tmp_path / "file", to="keras3")


def test_an_import_never_replaces_a_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    export_checkpoint(path, tmp_path / "file", to="numpy")
    with pytest.raises(CheckpointError, match="is a checkpoint already"):
        import_checkpoint(tmp_path / "file", tmp_path / "a", source_format="numpy")
    assert store.verify(path)


def test_an_export_that_fails_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a")
    export_checkpoint(path, tmp_path / "file", to="numpy")
    before = (tmp_path / "file").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(CheckpointError, match=r"file: cannot be written: No space left on device"):
        export_checkpoint(path, tmp_path / "file", to="numpy")
    assert (tmp_path / "file").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]


def test_unknown_formats_and_slotless_exports_are_refused(tmp_path: Path) -> None:
    path: Any = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="to must be one of"):
        export_checkpoint(path, tmp_path / "file", to="caffe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="source_format must be one of"):
        import_checkpoint(path, tmp_path / "file", source_format="caffe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="slots=False writes parameters alone"):
        export_checkpoint(path, tmp_path / "file", to="keras", slots=False)
    with pytest.raises(CheckpointError, match="there is no such file"):
        import_checkpoint(tmp_path / "gone", tmp_path / "b", source_format="numpy")


@pytest.mark.parametrize("to", ["numpy", "safetensors"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/x", "cannot be written: there is no directory .*nowhere"),
        (".", "is a directory; give the file to write in it"),
        ("/", "is a directory"),
        ("step_00000000/x", "cannot be written into the checkpoint"),
        ("/proc/x", "cannot be written: .*No such file"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_an_export_onto_nothing_is_refused_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, output: str, message: str
) -> None:
    with DistNadam(backend="local").build({"w": np.ones(2)}) as optimizer:
        path = optimizer.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(path, output, to=to)
    store.verify(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000000"]
