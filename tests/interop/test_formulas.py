"""Which formulas, weight decays and signs go to which framework's file, without the frameworks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from distnadam import DistNadam
from distnadam.checkpoint.diff import compare
from distnadam.errors import CheckpointError, ConversionError
from distnadam.hyperparameters import NadamConfig
from distnadam.interop import (
    Format,
    export_checkpoint,
    import_checkpoint,
    keras,
    load_checkpoint,
    optax,
)
from distnadam.interop import torch as torch_format
from distnadam.interop.formulas import NO_SCHEDULE, momentum
from distnadam.nadam.step_scalars import Clock, step_scalars

DECAYED = {"weight_decay": 0.125}
COUPLED = {**DECAYED, "decoupled_weight_decay": False}
UPWARD = {"maximize": True}
SHAPES = {"bias": (3,), "kernel": (4, 3)}


def saved(root: Path, *, steps: int = 3, at: int | None = None, **config: Any) -> Path:
    """Save after some steps, or as if there had been `at`."""
    rng = np.random.default_rng(0)
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    with DistNadam(**{"lr": 0.25, **config}, backend="local").build(start) as optimizer:
        for _ in range(steps):
            optimizer.apply_gradients({n: rng.standard_normal(s) for n, s in SHAPES.items()})
        if at is not None:
            product = np.float64(config.get("beta_1", 0.9) ** at)
            optimizer.set_weights([np.int64(at), product, *optimizer.get_weights()[2:]])
        return Path(optimizer.save(root))


@pytest.mark.parametrize("formula", ["nadam", "nadam_optax", "nadam_algoperf", "adam"])
@pytest.mark.parametrize(
    "rest",
    [{**COUPLED, **UPWARD}, DECAYED, {"use_ema": True, "ema_overwrite_frequency": 2}],
    ids=["coupled", "decoupled", "averaged"],
)
@pytest.mark.parametrize("to", ["numpy", "safetensors"])
def test_our_own_files_hold_every_setting(
    to: Format, rest: dict[str, Any], formula: str, tmp_path: Path
) -> None:
    before = saved(tmp_path / "a", formula=formula, **rest)
    export_checkpoint(before, tmp_path / "file", to=to)
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=to)
    assert compare(before, Path(back.path)).same


@pytest.mark.parametrize(
    ("to", "config", "named"),
    [
        ("keras3", {"schedule_decay": 1.0}, "Nadam"),
        ("keras3", {"schedule_decay": 1.0, **DECAYED}, "Nadam"),
        ("keras3", {"formula": "adam_keras"}, "Adam"),
        ("keras3", {"formula": "adam_keras", **DECAYED}, "AdamW"),
        ("optax", {"formula": "nadam_optax"}, "nadam"),
        ("optax", {"formula": "nadam_optax", **DECAYED}, "nadamw"),
        ("optax", {"formula": "adam"}, "adam"),
        ("optax", {"formula": "adam", **DECAYED}, "adamw"),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_what_a_framework_computes_goes_there_and_back(
    to: Format, config: dict[str, Any], named: str, steps: int, tmp_path: Path
) -> None:
    before = saved(tmp_path / "a", steps=steps, **config)
    state = load_checkpoint(before)
    name = keras.class_of_keras_3 if to == "keras3" else optax.function_name
    assert name(state) == named
    assert export_checkpoint(before, tmp_path / "file", to=to).notes == ()
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=to)
    assert back.notes == ()
    found = compare(before, Path(back.path))
    assert found.tensors == found.structure == ()
    assert found.settings.keys() <= {"m_schedule"}  # float32 in Keras 3's variables
    for given, expected in found.settings.values():
        assert given == pytest.approx(expected, rel=1e-7)


NO_ARGUMENT = "no argument for it: "


@pytest.mark.parametrize(
    ("to", "config", "message"),
    [
        ("keras3", {"formula": "nadam_optax"}, "momentum schedule: there is none here, and Keras "),
        ("keras3", {"formula": "nadam_algoperf"}, "momentum schedule: there is none here, .* 3 ha"),
        (
            "keras3",
            {"formula": "adam"},
            r"epsilon: formula='adam' adds it after .*, and Keras 3 before; .* 0\.06\d+ at step 4",
        ),
        (
            "keras3",
            {"formula": "adam_keras", **COUPLED},
            rf"weight_decay: 0\.125 .*{NO_ARGUMENT}add",
        ),
        (
            "keras3",
            {"formula": "adam_keras", **UPWARD},
            f"maximize: .*{NO_ARGUMENT}negate the loss",
        ),
        ("optax", {"formula": "adam_keras"}, r"adds it before .* and optax\.adam after"),
        (
            "optax",
            {"formula": "nadam_algoperf"},
            r"look-ahead: .* and optax\.nadam by 1 - beta_1 \*\* \(step \+ 1\); beta_1 \*\* 4 is",
        ),
        (
            "optax",
            {"formula": "adam", **COUPLED},
            rf"optax\.adam has {NO_ARGUMENT}put optax\.add_decayed_weights\(0\.125\) before it",
        ),
        (
            "optax",
            {"formula": "nadam_optax", **DECAYED, **UPWARD},
            rf"optax\.nadamw has {NO_ARGUMENT}put optax\.scale\(-1\) first",
        ),
        ("keras", {"formula": "nadam_algoperf"}, "look-ahead: .* and the reference by"),
        ("keras", DECAYED, rf"weight_decay: 0\.125 here, decoupled, .*{NO_ARGUMENT}multiply each"),
        ("keras", COUPLED, rf"coupled \(L2\), and the reference .*{NO_ARGUMENT}add weight_decay"),
        ("keras", UPWARD, f"maximize: True here, and the reference .*{NO_ARGUMENT}negate"),
    ],
)
def test_what_a_framework_lacks_is_refused_with_the_remedy_unless_asked_for(
    to: Format, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, file = saved(tmp_path / "a", **config), tmp_path / "file"
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(path, file, to=to)
    assert not file.exists()
    done = export_checkpoint(path, file, to=to, lossy=True)
    assert done.notes[0].startswith("differs: ")
    state = load_checkpoint(path)
    in_memory: dict[str, Any] = {
        "keras": keras.weights,
        "keras3": keras.variables,
        "optax": lambda state: optax.opt_state(state, None),
    }
    with pytest.raises(ConversionError, match=message):
        in_memory[to](state)


@pytest.mark.parametrize(
    ("to", "config", "last"),
    [
        ("keras3", {"formula": "adam"}, 16_000),
        ("optax", {"formula": "adam_keras"}, 16_000),
        ("optax", {"formula": "nadam_algoperf"}, 163),
        ("keras3", {"formula": "nadam_optax"}, 406),
    ],
)
def test_what_no_longer_matters_is_no_difference(
    to: Format, config: dict[str, Any], last: int, tmp_path: Path
) -> None:
    early, late = (saved(tmp_path / str(at), at=at, **config) for at in (last, last + 700))
    with pytest.raises(ConversionError):
        export_checkpoint(early, tmp_path / "file", to=to)
    assert export_checkpoint(late, tmp_path / "file", to=to).notes == ()


def test_a_large_schedule_decay_is_optaxs_momentum_and_goes_to_optax(tmp_path: Path) -> None:
    config = NadamConfig(schedule_decay=NO_SCHEDULE)
    assert {momentum(config, t, NO_SCHEDULE) for t in range(1, 100)} == {0.9}
    ours, theirs = Clock(), Clock()
    for _ in range(300):
        one = step_scalars(ours, config)
        other = step_scalars(theirs, NadamConfig(formula="nadam_optax"))
        assert one.coefficients[:5] == pytest.approx(other.coefficients[:5], rel=1e-12)
        assert all(map(math.isnan, one.coefficients[5:]))
        ours, theirs = one.after, other.after
    before = saved(tmp_path / "a", schedule_decay=NO_SCHEDULE)
    assert export_checkpoint(before, tmp_path / "file", to="optax").notes == ()
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format="optax")
    assert load_checkpoint(back.path).config.formula == "nadam_optax"


def test_the_reference_takes_optaxs_momentum_as_a_large_schedule_decay(tmp_path: Path) -> None:
    before = saved(tmp_path / "a", formula="nadam_optax")
    assert export_checkpoint(before, tmp_path / "file", to="keras").notes == ()
    back = load_checkpoint(
        import_checkpoint(tmp_path / "file", tmp_path / "b", source_format="keras").path
    )
    assert (back.config.formula, back.config.schedule_decay) == ("nadam", NO_SCHEDULE)
    assert back.clock.m_schedule == pytest.approx(0.9**3)


def test_adam_is_not_of_the_references_list(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", formula="adam_keras")
    for lossy in (False, True):
        with pytest.raises(ConversionError, match=r"'adam_keras' is Adam's, .* exported to keras3"):
            export_checkpoint(path, tmp_path / "file", to="keras", lossy=lossy)
    export_checkpoint(saved(tmp_path / "b"), tmp_path / "file", to="keras")
    for config in ({"amsgrad": False}, {"formula": "adam"}):
        with pytest.raises(ConversionError, match="its configuration is Adam's"):
            import_checkpoint(
                tmp_path / "file", tmp_path / "c", source_format="keras", config=config
            )


def without_about(path: Path, to: Format, **config: Any) -> Path:
    """Return a file as a user writes it: the entries alone."""
    export_checkpoint(saved(path / "a", **config), path / "file", to=to)
    with np.load(path / "file") as data:
        np.savez(path / "file.npz", **{name: data[name] for name in data if name != "about"})
    return path / "file.npz"


def taken(file: Path, source_format: Format, **config: Any) -> tuple[NadamConfig, float]:
    done = import_checkpoint(
        file, file.parent / "taken", source_format=source_format, config=config
    )
    state = load_checkpoint(done.path)
    return state.config, state.clock.m_schedule


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("nadam_optax", 0.0)),
        ({"weight_decay": 0.5}, ("nadam_optax", 0.5)),
        ({"formula": "adam"}, ("adam", 0.0)),
        ({"formula": "adam", "weight_decay": 0.5, "mu_dtype": None}, ("adam", 0.5)),
    ],
)
def test_optaxs_function_is_that_of_config(
    given: dict[str, Any], expected: tuple[str, float], tmp_path: Path
) -> None:
    file = without_about(tmp_path, "optax", formula="nadam_optax", beta_1=0.5)
    config, product = taken(file, "optax", learning_rate=0.25, b1=0.5, **given)
    assert (config.formula, config.weight_decay) == expected
    assert (config.decoupled_weight_decay, config.epsilon, product) == (True, 1e-8, 0.125)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eps_root": 1e-8}, "eps_root: 1e-08 there, and distnadam has none"),
        ({"mu_dtype": "bfloat16"}, "mu_dtype: 'bfloat16' there, and distnadam keeps"),
        ({"mask": {"bias": False}}, "mask: .* there, and distnadam has groups for that"),
    ],
)
def test_an_argument_of_optax_that_we_lack_is_refused_by_name(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = without_about(tmp_path, "optax", formula="adam")
    with pytest.raises(ConversionError, match=message):
        taken(file, "optax", learning_rate=0.25, **given)
    assert not (tmp_path / "taken").exists()


NADAM_OF_KERAS_3 = {
    "name": "nadam",
    "learning_rate": 0.25,
    "weight_decay": None,
    "clipnorm": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "beta_1": 0.9,
    "epsilon": 1e-7,
}
ADAM_OF_KERAS_3 = {**NADAM_OF_KERAS_3, "name": "adam", "amsgrad": False}


def test_the_class_of_keras_3_is_seen_in_its_configuration(tmp_path: Path) -> None:
    nadam = without_about(tmp_path / "n", "keras3", schedule_decay=1.0)
    adam = without_about(tmp_path / "a", "keras3", formula="adam_keras")
    config, _ = taken(nadam, "keras3", **NADAM_OF_KERAS_3)
    assert (config.formula, config.schedule_decay, config.weight_decay) == ("nadam", 1.0, 0.0)
    config, product = taken(adam, "keras3", **ADAM_OF_KERAS_3)
    assert (config.formula, config.weight_decay, product) == ("adam_keras", 0.0, 0.9**3)
    done = import_checkpoint(
        adam,
        tmp_path / "w",
        source_format="keras3",
        config={**ADAM_OF_KERAS_3, "weight_decay": 0.004},
    )
    assert "exclude_from_weight_decay() left out" in done.notes[0]
    config = load_checkpoint(done.path).config
    assert (config.weight_decay, config.decoupled_weight_decay) == (0.004, True)
    with pytest.raises(CheckpointError, match="m_schedule: expected one finite number"):
        taken(adam, "keras3", **NADAM_OF_KERAS_3)
    with pytest.raises(CheckpointError, match="4 slots, got 7 arrays; formula is 'adam_keras'"):
        taken(nadam, "keras3", **ADAM_OF_KERAS_3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"amsgrad": True}, "amsgrad: True there, and distnadam has no AMSGrad"),
        (
            {"exclude_from_weight_decay": ["bias"]},
            r"exclude_from_weight_decay: \['bias'\] there, and distnadam has groups for that",
        ),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2 there"),
        ({"loss_scale_factor": 2.0}, "loss_scale_factor: 2.0 there"),
    ],
)
def test_a_setting_of_keras_3_that_we_lack_is_refused_by_name(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = without_about(tmp_path, "keras3", formula="adam_keras")
    with pytest.raises(ConversionError, match=message):
        taken(file, "keras3", **{**ADAM_OF_KERAS_3, **given})
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("formula", ["nadam", "adam_keras"])
@pytest.mark.parametrize("steps", [0, 3])
def test_keras_3_has_the_average_of_the_parameters_too(
    steps: int, formula: str, tmp_path: Path
) -> None:
    rest = {"schedule_decay": 1.0} if formula == "nadam" else {}
    average = {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2}
    before = saved(tmp_path / "a", steps=steps, formula=formula, **rest, **average)
    state = load_checkpoint(before)
    listed = keras.variables(state)
    assert [a.tobytes() for a in listed[2:4]] == [a.tobytes() for a in state.ema or ()]
    assert average.items() <= keras.config_of_keras_3(state).items()
    assert export_checkpoint(before, tmp_path / "file", to="keras3").notes == ()
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format="keras3")
    found = compare(before, Path(back.path))
    assert found.tensors == ()
    assert set(found.settings) <= {"m_schedule"}
    without = import_checkpoint(
        tmp_path / "file", tmp_path / "c", source_format="keras3", config={"use_ema": False}
    )
    assert load_checkpoint(without.path).ema is None
    about = without_about(tmp_path / "d", "keras3", formula=formula, **rest, **average)
    config = {**ADAM_OF_KERAS_3, **average} if formula == "adam_keras" else NADAM_OF_KERAS_3
    done = import_checkpoint(
        about, tmp_path / "e", source_format="keras3", config={**config, **average}
    )
    assert load_checkpoint(done.path).ema is not None


@pytest.mark.parametrize(
    ("to", "config"),
    [
        ("keras", {}),
        ("torch", {}),
        ("optax", {"formula": "nadam_optax"}),
    ],
)
def test_where_there_is_no_average_a_note_says_so_and_overwriting_is_refused(
    to: Format, config: dict[str, Any], tmp_path: Path
) -> None:
    if to == "torch":
        pytest.importorskip("torch")
    file = tmp_path / "file"
    kept = saved(tmp_path / "a", use_ema=True, **config)
    (note,) = export_checkpoint(kept, file, to=to).notes
    assert "the average of the parameters does not carry over" in note
    file.unlink()
    overwriting = saved(tmp_path / "b", use_ema=True, ema_overwrite_frequency=2, **config)
    with pytest.raises(ConversionError, match="ema_overwrite_frequency: 2 here"):
        export_checkpoint(overwriting, file, to=to)
    assert not file.exists()


def test_an_import_that_asks_for_an_average_begins_it_with_the_parameters(tmp_path: Path) -> None:
    export_checkpoint(saved(tmp_path / "a"), tmp_path / "file", to="numpy")
    done = import_checkpoint(
        tmp_path / "file", tmp_path / "b", source_format="numpy", config={"use_ema": True}
    )
    state = load_checkpoint(done.path)
    assert [a.tobytes() for a in state.ema or ()] == [a.tobytes() for a in state.params]


@pytest.mark.parametrize("file_format", ["numpy", "safetensors"])
def test_one_of_our_files_that_lacks_an_average_is_refused(
    file_format: Format, tmp_path: Path
) -> None:
    export_checkpoint(saved(tmp_path / "a", use_ema=True), tmp_path / "file", to=file_format)
    if file_format == "numpy":
        with np.load(tmp_path / "file") as data:
            entries = {name: data[name] for name in data if name != "ema/bias"}
        with open(tmp_path / "file", "wb") as file:
            np.savez(file, **entries)
    else:
        from safetensors.numpy import load_file, save_file

        with safe_open(tmp_path / "file", framework="numpy") as opened:
            metadata = opened.metadata()
        entries = load_file(tmp_path / "file")
        del entries["ema/bias"]
        save_file(entries, tmp_path / "file", metadata=metadata)
    with pytest.raises(CheckpointError, match="ema: tensor 'bias' is missing"):
        import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=file_format)


def test_amsgrads_largest_moments_are_left_out_where_asked_for(tmp_path: Path) -> None:
    file = without_about(tmp_path, "keras3", formula="adam_keras")
    with np.load(file) as data:
        entries = dict(data)
    entries |= {f"optimizer/{6 + i:05d}": entries[f"optimizer/{3 + 2 * i:05d}"] for i in range(2)}
    np.savez(file, **entries)
    done = import_checkpoint(
        file,
        tmp_path / "b",
        source_format="keras3",
        config={**ADAM_OF_KERAS_3, "amsgrad": True},
        lossy=True,
    )
    assert done.notes == ("differs: amsgrad: True there, and distnadam has no AMSGrad",)
    assert not compare(tmp_path / "a", done.path).tensors


@pytest.mark.parametrize(("to", "key"), [("keras3", "class"), ("optax", "function")])
def test_an_unknown_class_or_function_is_refused(to: Format, key: str, tmp_path: Path) -> None:
    config = {"formula": "adam_keras" if to == "keras3" else "adam"}
    export_checkpoint(saved(tmp_path / "a", **config), tmp_path / "file", to=to)
    with np.load(tmp_path / "file") as data:
        entries = dict(data)
    about = str(entries["about"]).replace('"Adam"', '"Lion"').replace('"adam"', '"lion"')
    np.savez(tmp_path / "file.npz", **{**entries, "about": np.array(about)})
    with pytest.raises(CheckpointError, match=f"its {key}: expected one of .*, got '[Ll]ion'"):
        import_checkpoint(tmp_path / "file.npz", tmp_path / "b", source_format=to)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"formula": "nadam_algoperf", **DECAYED}, "NAdam"),
        ({"formula": "adam", **UPWARD}, "Adam"),
        ({"formula": "adam_keras", **COUPLED}, "Adam"),
        ({"formula": "adam", **DECAYED}, "AdamW"),
    ],
)
def test_the_class_of_torch_follows_the_config(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    assert torch_format.class_name(load_checkpoint(saved(tmp_path, **config))) == name
