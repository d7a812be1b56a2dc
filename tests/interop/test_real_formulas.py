"""Each class of the real libraries and its settings: they go on from ours, and we from theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam.errors import ConversionError
from distnadam.interop import (
    Format,
    export_checkpoint,
    import_checkpoint,
    keras,
    load_checkpoint,
    optax,
)
from distnadam.interop import torch as torch_format
from tests.interop.libraries import (
    NAMES,
    Keras3,
    Optax,
    Params,
    TfKerasLegacy,
    Torch,
    close,
    go_on_here,
    in_names,
    params,
    trained,
)

pytestmark = pytest.mark.slow

DECAY = 0.1
DECAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "coupled": {"weight_decay": DECAY, "decoupled_weight_decay": False},
    "decoupled": {"weight_decay": DECAY, "decoupled_weight_decay": True},
}
decays = pytest.mark.parametrize("decay", DECAYS)
signs = pytest.mark.parametrize("maximize", [False, True], ids=["down", "up"])


def start(checkpoint: str) -> Params:
    return dict(zip(NAMES, load_checkpoint(checkpoint).params, strict=True))


def back(file: Path, source_format: Format, **config: Any) -> tuple[list[np.ndarray], Any]:
    """Return where we are 10 steps after a file of 25, and our optimizer."""
    done = import_checkpoint(file, file.parent / "back", source_format=source_format, config=config)
    ours, optimizer = go_on_here(done.path, 25)
    assert optimizer.iterations == 35
    return in_names(ours), optimizer


@decays
@signs
@pytest.mark.parametrize("formula", ["nadam", "nadam_optax", "adam"])
def test_torch_goes_on_from_ours(formula: str, maximize: bool, decay: str, tmp_path: Path) -> None:
    import torch

    settings = {"formula": formula, "maximize": maximize, "epsilon": 1e-6, **DECAYS[decay]}
    checkpoint = trained(tmp_path, **settings)
    export_checkpoint(checkpoint, tmp_path / "t.pt", to="torch")
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    name = torch_format.class_name(load_checkpoint(checkpoint))
    assert name == {"adam": "AdamW" if decay == "decoupled" else "Adam"}.get(formula, "NAdam")
    there = Torch({name: tensor.numpy() for name, tensor in content["model"].items()}, name)
    there.optimizer.load_state_dict(content["optimizer"])
    close(in_names(there.run(25, 35)), in_names(go_on_here(checkpoint, 25)[0]))
    slots = there.optimizer.state_dict()["state"]
    assert ("mu_product" in slots[0]) == (name == "NAdam")
    assert [int(slots[i]["step"]) for i in range(3)] == [35, 35, 35]


@signs
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("NAdam", {"momentum_decay": 0.02}),
        ("NAdam", {"weight_decay": DECAY}),
        ("NAdam", {"weight_decay": DECAY, "decoupled_weight_decay": True}),
        ("Adam", {}),
        ("Adam", {"weight_decay": DECAY}),
        ("AdamW", {"weight_decay": DECAY}),
        ("AdamW", {}),
    ],
)
def test_we_go_on_from_torchs(
    name: str, settings: dict[str, Any], maximize: bool, tmp_path: Path
) -> None:
    import torch

    there = Torch(params(), name, lr=0.01, maximize=maximize, **settings)
    there.run(0, 25)
    model = {n: t.detach() for n, t in there.tensors.items()}
    content = {"model": model, "optimizer": there.optimizer.state_dict()}
    torch.save(content, tmp_path / "t.pt")
    ours, optimizer = back(tmp_path / "t.pt", "torch")
    close(in_names(there.run(25, 35)), ours)
    config = optimizer.get_config()
    assert (config["formula"], config["maximize"]) == (
        "nadam" if name == "NAdam" else "adam",
        maximize,
    )


def transformations(maximize: bool, decay: str) -> list[tuple[Any, ...]]:
    """Return what stands before optax's function where it has no argument."""
    negated = [("scale", -1)] if maximize else []
    return negated + ([("add_decayed_weights", DECAY)] if decay == "coupled" else [])


@decays
@signs
@pytest.mark.parametrize("formula", ["nadam_optax", "adam"])
def test_optax_goes_on_from_ours(formula: str, maximize: bool, decay: str, tmp_path: Path) -> None:
    settings = {"formula": formula, "maximize": maximize, "epsilon": 1e-6, **DECAYS[decay]}
    checkpoint = trained(tmp_path, **settings)
    state, before = load_checkpoint(checkpoint), transformations(maximize, decay)
    there = Optax(start(checkpoint), optax.function_name(state), before, **optax.config(state))
    if before:
        with pytest.raises(ConversionError):
            optax.opt_state(state, there.state)
    there.state = optax.opt_state(state, there.state, lossy=bool(before))
    close(in_names(there.run(25, 35)), in_names(go_on_here(checkpoint, 25)[0]))

    notes = export_checkpoint(checkpoint, tmp_path / "o.npz", to="optax", lossy=bool(before)).notes
    assert len(notes) == len(before)


@decays
@signs
@pytest.mark.parametrize("formula", ["nadam_optax", "adam"])
def test_we_go_on_from_optaxs(formula: str, maximize: bool, decay: str, tmp_path: Path) -> None:
    name = {"nadam_optax": "nadam", "adam": "adam"}[formula]
    rest = {"weight_decay": DECAY} if decay == "decoupled" else {}
    there = Optax(
        params(),
        f"{name}w" if rest else name,
        transformations(maximize, decay),
        learning_rate=0.01,
        **rest,
    )
    there.run(0, 25)
    np.savez(tmp_path / "o.npz", **there.entries())
    config = {"formula": formula, "maximize": maximize, "learning_rate": 0.01, **DECAYS[decay]}
    ours, _ = back(tmp_path / "o.npz", "optax", **config)
    close(in_names(there.run(25, 35)), ours)


@decays
@signs
@pytest.mark.parametrize("formula", ["nadam", "adam_keras"])
def test_keras_3_goes_on_from_ours(
    formula: str, maximize: bool, decay: str, tmp_path: Path
) -> None:
    schedule = {"schedule_decay": 1.0} if formula == "nadam" else {}
    checkpoint = trained(
        tmp_path, formula=formula, maximize=maximize, epsilon=1e-5, **schedule, **DECAYS[decay]
    )
    state, lossy = load_checkpoint(checkpoint), maximize or decay == "coupled"
    sign, l2 = -1 if maximize else 1, DECAY if decay == "coupled" else 0.0
    there = Keras3(
        start(checkpoint),
        keras.class_of_keras_3(state),
        lambda gradient, variable: np.float32(sign * gradient + l2 * variable),
        **keras.config_of_keras_3(state),
    )
    if lossy:
        with pytest.raises(ConversionError):
            keras.variables(state)
    there.load(keras.variables(state, lossy=lossy))
    close(in_names(there.run(25, 35)), in_names(go_on_here(checkpoint, 25)[0]))
    assert int(there.optimizer.iterations) == 35


# Keras's own get_config warns
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Nadam", {"weight_decay": DECAY}),
        ("Adam", {}),
        ("Adam", {"weight_decay": DECAY}),
        ("AdamW", {}),
        ("Nadam", {"use_ema": True, "ema_momentum": 0.75}),
        ("Adam", {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3}),
    ],
)
def test_we_go_on_from_keras_3s(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    there = Keras3(params(), name, learning_rate=0.01, epsilon=1e-5, **settings)
    there.run(0, 25)
    np.savez(tmp_path / "k.npz", **there.entries())
    ours, optimizer = back(tmp_path / "k.npz", "keras3", **there.optimizer.get_config())
    assert optimizer.get_config()["formula"] == ("nadam" if name == "Nadam" else "adam_keras")
    close(in_names(there.run(25, 35)), ours)
    if "use_ema" in settings:
        averages = [np.asarray(a) for a in there.optimizer.variables[2 : 2 + len(ours)]]
        close(averages, in_names(optimizer.get_ema_params()))


@pytest.mark.parametrize("every", [None, 4])
def test_keras_3_goes_on_with_our_average(every: int | None, tmp_path: Path) -> None:
    average = {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": every}
    checkpoint = trained(tmp_path, schedule_decay=1.0, epsilon=1e-5, **average)
    state = load_checkpoint(checkpoint)
    there = Keras3(start(checkpoint), "Nadam", **keras.config_of_keras_3(state))
    there.load(keras.variables(state))
    ours, optimizer = go_on_here(checkpoint, 25)
    close(in_names(there.run(25, 35)), in_names(ours))
    averages = [np.asarray(a) for a in there.optimizer.variables[2:5]]
    close(averages, in_names(optimizer.get_ema_params()))


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_what_keras_3_keeps_beside_is_refused_by_name(tmp_path: Path) -> None:
    there = Keras3(params(), "Adam", learning_rate=0.01, amsgrad=True)
    there.run(0, 2)
    np.savez(tmp_path / "k.npz", **there.entries())
    with pytest.raises(ConversionError, match="amsgrad: True there, and distnadam"):
        back(tmp_path / "k.npz", "keras3", **there.optimizer.get_config())


def test_tf_keras_legacy_goes_on_from_optaxs_momentum(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, formula="nadam_optax", epsilon=1e-6)
    state = load_checkpoint(checkpoint)
    settings = keras.config(state)
    there = TfKerasLegacy(start(checkpoint), learning_rate=settings.pop("lr"), **settings)
    there.load(keras.weights(state))
    close(in_names(there.run(25, 35)), in_names(go_on_here(checkpoint, 25)[0]))
