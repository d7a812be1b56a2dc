"""Groups of tensors go to frameworks and come back, or are refused by name with the remedy."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group
from distnadam.checkpoint.diff import compare
from distnadam.errors import CheckpointError, ConversionError
from distnadam.groups import groups_of
from distnadam.interop import (
    Format,
    export_checkpoint,
    import_checkpoint,
    keras,
    load_checkpoint,
    optax,
)
from distnadam.interop.formulas import Conversion
from distnadam.interop.groups import Own, made_groups
from distnadam.schedules import Constant
from tests.interop import libraries

SHAPES = {"a.bias": (3,), "a.weight": (4, 3), "b.bias": (2,), "b.weight": (3, 2), "head": (5,)}
FREE = Group("**/bias", weight_decay=0.0)
STILL = Group("a/**", trainable=False)
DECAY = {"weight_decay": 0.125}


def gradients(step: int) -> dict[str, Any]:
    rng = np.random.default_rng([3, step])
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def saved(root: Path, *groups: Group, steps: int = 3, **config: Any) -> Path:
    config = {"lr": 0.25, **config, "groups": groups, "backend": "local"}
    with DistNadam(**config).build(gradients(99)) as optimizer:
        for step in range(steps):
            optimizer.apply_gradients(gradients(step))
        return Path(optimizer.save(root))


@pytest.mark.parametrize("to", ["numpy", "safetensors"])
def test_our_own_files_hold_groups(to: Format, tmp_path: Path) -> None:
    groups = [STILL, Group("head", lr=Constant(0.5), clipvalue=1.0), FREE]
    before = saved(tmp_path / "a", *groups, **DECAY)
    assert export_checkpoint(before, tmp_path / "file", to=to).notes == ()
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=to)
    assert compare(before, back.path).same


FITTING: dict[Format, dict[str, Any]] = {
    "keras": {},
    "keras3": {"formula": "adam_keras"},
    "optax": {"formula": "adam"},
}


@pytest.mark.parametrize(
    ("to", "group", "message"),
    [
        ("optax", Group("head", lr_scale=0.5), r"learning rate: 0\.125 of Group\('head', lr_scale"),
        ("optax", Group("head", lr_scale=0.5), r"put optax\.masked\(optax\.scale"),
        ("optax", Group("head", epsilon=1e-3), r"epsilon: 0\.001 of .*'head'.* has one for all"),
        ("optax", STILL, r"frozen: 'a.bias', 'a.weight' here, .* put optax\.masked\(optax\.set_to"),
        ("optax", Group("head", weight_decay=0.5), r"weight_decay: 0\.5 of .* that decay, 0\.125"),
        ("keras3", Group("head", lr=0.5), r"learning rate: 0\.5 of .*, and Keras 3 has one"),
        ("keras3", Group("head", clipvalue=0.5), r"clipvalue: 0\.5 of Group\('head'"),
        ("keras3", FREE, "'a.bias', 'b.bias' here, .* call exclude_from_weight_decay of AdamW"),
        ("keras", Group("head", lr=0.5), r"learning rate: 0\.5 of .*, and the reference has one"),
    ],
)
def test_what_a_framework_has_one_of_for_all_tensors_is_refused_with_the_remedy(
    to: Format, group: Group, message: str, tmp_path: Path
) -> None:
    path, file = saved(tmp_path / "a", group, **DECAY, **FITTING[to]), tmp_path / "file"
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(path, file, to=to)
    assert not file.exists()
    assert export_checkpoint(path, file, to=to, lossy=True).notes
    state = load_checkpoint(path)
    in_memory: dict[str, Any] = {
        "keras": keras.weights,
        "keras3": keras.variables,
        "optax": lambda state: optax.opt_state(state, None),
    }
    with pytest.raises(ConversionError, match=message):
        in_memory[to](state)


def test_optaxs_mask_says_what_does_not_decay(tmp_path: Path) -> None:
    before = saved(tmp_path / "a", FREE, **DECAY, formula="adam")
    arguments = optax.config(load_checkpoint(before))
    expected = {name: not name.endswith("bias") for name in SHAPES}
    assert (arguments["mask"], arguments["weight_decay"]) == (expected, 0.125)
    (note,) = export_checkpoint(before, tmp_path / "file", to="optax").notes
    assert note.startswith("weight_decay: takes nothing from 'a.bias', 'b.bias'; give optax.adamw ")
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format="optax")
    assert compare(before, back.path).same


def test_one_group_alone_may_decay_in_optax(tmp_path: Path) -> None:
    before = saved(tmp_path / "a", Group("**/weight", **DECAY), formula="adam")
    state = load_checkpoint(before)
    assert optax.function_name(state) == "adamw"
    assert [name for name, on in optax.config(state)["mask"].items() if on] == [
        "a.weight",
        "b.weight",
    ]
    export_checkpoint(before, tmp_path / "file", to="optax")
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format="optax")
    assert load_checkpoint(back.path).settings[1][1].weight_decay == 0.125
    assert load_checkpoint(back.path).settings[0][1].weight_decay == 0.0


@pytest.mark.parametrize(
    ("to", "config"), [("keras", {}), ("keras3", {"formula": "adam_keras", **DECAY})]
)
def test_frozen_tensors_are_in_no_list_of_keras_and_come_back(
    to: Format, config: dict[str, Any], tmp_path: Path
) -> None:
    before = saved(tmp_path / "a", STILL, **config)
    (note,) = export_checkpoint(before, tmp_path / "file", to=to).notes
    assert note.startswith("frozen: 'a.bias', 'a.weight': among the parameters and not in the opt")
    with np.load(tmp_path / "file") as data:
        assert len([name for name in data if name.startswith("optimizer/")]) == 2 + 2 * 3
        entries = dict(data)
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=to)
    assert compare(before, back.path).same
    del entries["about"]
    np.savez(tmp_path / "file.npz", **entries)
    given = {"learning_rate": 0.25, "epsilon": 1e-7, "schedule_decay": 0.004, **config}
    order = ["a.bias", "a.weight", "b.bias", "b.weight", "head"]
    for names in (order, order[2:]):
        back = import_checkpoint(
            tmp_path / "file.npz",
            tmp_path / str(len(names)),
            source_format=to,
            config=given | {"groups": [STILL.to_dict()]},
            order=names,
        )
        assert compare(before, back.path).same
    with pytest.raises(CheckpointError, match="expected"):
        import_checkpoint(tmp_path / "file.npz", tmp_path / "c", source_format=to, config=given)


def test_a_model_that_is_all_frozen_goes_to_no_list(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Group("**", trainable=False), steps=0)
    with pytest.raises(ConversionError, match="every tensor is frozen"):
        export_checkpoint(path, tmp_path / "file", to="keras")


def made(own: dict[str, Own], *given: Group) -> list[Group]:
    return made_groups(Conversion(Path("file"), config={"groups": given}), own)


def kept(**names: Own) -> dict[str, Own]:
    return {name.replace("__", "/"): own for name, own in names.items()}


ZERO: Own = {"weight_decay": 0.0}


@pytest.mark.parametrize(
    ("own", "patterns"),
    [
        (kept(a__bias=ZERO, a__w={}, b__bias=ZERO, b__w={}), ["**/bias"]),
        (kept(a__bias=ZERO, a__w={}, b__bias={}, c__bias=ZERO), ["a/bias", "c/bias"]),
        (kept(a__ln__w=ZERO, a__x__w={}, b__ln__w=ZERO), ["**/ln/w"]),
        (kept(a__x={"trainable": False}, a__y={"trainable": False}, b__x={}), ["a/**"]),
        (kept(a=ZERO, b={}), ["a"]),
        (kept(bias={}, a__bias=ZERO, b__bias=ZERO), ["a/bias", "b/bias"]),
    ],
)
def test_patterns_are_ends_and_beginnings_of_paths_that_mean_these_tensors_alone(
    own: dict[str, Own], patterns: list[str]
) -> None:
    groups = made(own)
    assert [group.pattern for group in groups] == patterns
    found = groups_of(groups, list(own))
    assert [number >= 0 for number in found] == [bool(each) for each in own.values()]


def test_groups_that_config_gives_come_first_and_hold() -> None:
    own = kept(a__bias=ZERO, a__w={}, b__bias=ZERO)
    assert made(own, STILL) == [STILL, Group("b/bias", weight_decay=0.0)]


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"w*": ZERO, "wide": {}}, "wide"),
        ({"x": {}, "module.x": ZERO}, "x"),
        ({"x": ZERO, "_orig_mod.x": {"weight_decay": 0.5}}, "_orig_mod.x"),
        ({"a.b": ZERO, "a/b": {}}, "a/b"),
    ],
)
def test_a_path_that_no_pattern_means_alone_is_refused_by_name(
    own: dict[str, Own], named: str
) -> None:
    with pytest.raises(ConversionError, match=f"{re.escape(repr(named))} has .* rename it"):
        made(own)


def test_special_paths_of_one_setting_are_no_trouble() -> None:
    assert groups_of(made({"w*": ZERO, "x": {}}), ["w*", "x"]) == [0, -1]
    assert groups_of(made({"a.b": ZERO, "a/b": ZERO, "c": {}}), ["a.b", "a/b", "c"]) == [0, 0, -1]


def exported(tmp_path: Path, *groups: Group, **config: Any) -> tuple[Path, Path, Any]:
    torch = pytest.importorskip("torch")
    before = saved(tmp_path / "a", *groups, **config)
    done = export_checkpoint(before, tmp_path / "file.pt", to="torch")
    return before, Path(done.path), torch.load(done.path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["nadam", "adam"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_torchs_parameter_groups_are_ours_and_come_back(
    formula: Any, decoupled: bool, tmp_path: Path
) -> None:
    groups = [STILL, FREE, Group("head", lr=0.5, epsilon=1e-3)]
    config = {**DECAY, "formula": formula, "decoupled_weight_decay": decoupled}
    before, file, content = exported(tmp_path, *groups, **config)
    found = [
        (each["param_names"], each["lr"], each["eps"], each["weight_decay"])
        for each in content["optimizer"]["param_groups"]
    ]
    assert found == [
        (["b.weight"], 0.25, 1e-7, 0.125),
        (["b.bias"], 0.25, 1e-7, 0.0),
        (["head"], 0.5, 1e-3, 0.125),
    ]
    assert sorted(content["model"]) == sorted(SHAPES)
    back = import_checkpoint(file, tmp_path / "b", source_format="torch")
    assert [note.partition(":")[0] for note in back.notes] == ["learning rate"]
    again = compare(before, back.path)
    assert all(name.startswith("config.groups[") for name in again.settings)
    assert (again.tensors, again.structure) == ((), ())
    ours, theirs = (load_checkpoint(path) for path in (before, back.path))
    assert theirs.frozen == ours.frozen
    for name, one, other in zip(ours.names, ours.settings, theirs.settings, strict=True):
        if name not in ours.frozen:
            assert (one[0], one[1].epsilon) == (other[0], other[1].epsilon)
            assert one[1].weight_decay == other[1].weight_decay


@pytest.mark.slow
def test_torch_goes_on_from_our_groups(tmp_path: Path) -> None:
    groups = [STILL, FREE, Group("head", lr_scale=0.5)]
    before, _, content = exported(tmp_path, *groups, **DECAY, formula="adam")
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in content["model"].items()}
    lists = [[tensors[n] for n in g["param_names"]] for g in content["optimizer"]["param_groups"]]
    optimizer = torch.optim.AdamW([{"params": each} for each in lists])
    optimizer.load_state_dict(content["optimizer"])
    with DistNadam.restore(before, backend="local") as ours:
        for step in range(3, 9):
            ours.apply_gradients(gradients(step))
            for name, gradient in gradients(step).items():
                tensors[name].grad = torch.tensor(gradient)
            optimizer.step()
        for name, expected in ours.get_params().items():
            difference = np.abs(tensors[name].detach().numpy() - expected).max()
            assert difference <= 2**-21 * np.abs(expected).max(), name


@pytest.mark.slow
def test_a_users_file_of_torch_needs_groups_for_what_is_frozen(tmp_path: Path) -> None:
    before, file, content = exported(tmp_path, STILL, FREE, **DECAY)
    torch = pytest.importorskip("torch")
    del content["about"]
    torch.save(content, file)
    back = import_checkpoint(file, tmp_path / "b", source_format="torch")
    assert back.notes[-1].startswith("model: 'a.bias', 'a.weight': in no group of the optimizer")
    assert load_checkpoint(back.path).names == ["b.bias", "b.weight", "head"]
    back = import_checkpoint(
        file, tmp_path / "c", source_format="torch", config={"groups": [STILL]}
    )
    assert back.notes == ()
    found = compare(before, back.path)
    assert (found.tensors, found.structure) == ((), ())


@pytest.mark.slow
def test_one_setting_of_config_holds_for_all_groups_of_torch(tmp_path: Path) -> None:
    _, file, _ = exported(tmp_path, FREE, Group("head", lr=0.5), **DECAY)
    done = import_checkpoint(
        file, tmp_path / "b", source_format="torch", config={"lr": 0.1, "weight_decay": 0.5}
    )
    state = load_checkpoint(done.path)
    assert {(rate, own.weight_decay) for rate, own in state.settings} == {(0.1, 0.5)}
    assert state.config.groups == ()


ON_LIBRARIES = [Group("bias", weight_decay=0.0), Group("kernel", lr_scale=0.5)]


@pytest.mark.slow
def test_optax_goes_on_with_the_mask_and_the_remedies(tmp_path: Path) -> None:
    real = pytest.importorskip("optax")
    groups = [*ON_LIBRARIES, Group("scale", trainable=False)]
    checkpoint = libraries.trained(tmp_path, formula="adam", groups=groups, **DECAY)
    state = load_checkpoint(checkpoint)
    start = dict(zip(libraries.NAMES, state.params, strict=True))
    there = libraries.Optax(start, "adamw", **optax.config(state))
    only = {name: {other: other == name for other in start} for name in start}
    there.optimizer = real.chain(
        there.optimizer,
        real.masked(real.scale(0.5), only["kernel"]),
        real.masked(real.set_to_zero(), only["scale"]),
    )
    there.state = optax.opt_state(state, there.optimizer.init(there.params), lossy=True)
    expected = libraries.in_names(libraries.go_on_here(checkpoint, 25)[0])
    libraries.close(libraries.in_names(there.run(25, 35)), expected)


@pytest.mark.slow
def test_keras_3_goes_on_with_what_is_left_out_of_weight_decay(tmp_path: Path) -> None:
    pytest.importorskip("keras")
    checkpoint = libraries.trained(
        tmp_path, formula="adam_keras", epsilon=1e-5, groups=ON_LIBRARIES[:1], **DECAY
    )
    state = load_checkpoint(checkpoint)
    start = dict(zip(libraries.NAMES, state.params, strict=True))
    there = libraries.Keras3(start, keras.class_of_keras_3(state), **keras.config_of_keras_3(state))
    there.optimizer.built = False  # as before `build`, from where on Keras takes no exclusions
    there.optimizer.exclude_from_weight_decay(var_list=[there.variables["bias"]])
    there.optimizer.built = True
    there.load(keras.variables(state, lossy=True))
    expected = libraries.in_names(libraries.go_on_here(checkpoint, 25)[0])
    libraries.close(libraries.in_names(there.run(25, 35)), expected)
