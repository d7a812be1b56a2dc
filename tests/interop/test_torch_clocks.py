"""torch's optimizers skip parameters without a gradient, and so do we: the same trajectories, and
clocks and betas of single tensors that go there and come back.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group
from distnadam.checkpoint.diff import compare
from distnadam.errors import CheckpointError, ConversionError
from distnadam.interop import export_checkpoint, import_checkpoint, load_checkpoint
from distnadam.interop import torch as torch_format
from distnadam.nadam.step_scalars import TensorClock

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

SHAPES = {"embed.weight": (20, 6), "body.weight": (6, 6), "body.bias": (6,), "head": (3, 6)}
STEPS = 200
KINDS: dict[str, dict[str, Any]] = {
    "NAdam": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
}
BETAS = {"body.bias": (0.6, 0.95), "head": (0.8, 0.99)}


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, np.ndarray | None]:
    """The first layer is frozen, and then not; one tensor has a gradient at some steps only."""
    rng = np.random.default_rng([2, step])
    drawn = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    found = {n: (np.copysign(1e-3, x) + x).astype(np.float32) for n, x in drawn.items()}
    is_frozen = step < 60 or 120 <= step < 130
    lacked = [*(["embed.weight"] if is_frozen else []), *(["head"] if step % 3 == 1 else [])]
    return {name: None if name in lacked else x for name, x in found.items()}


def torchs(kind: str, values: dict[str, np.ndarray]) -> tuple[dict[str, Any], Any]:
    """Return torch's parameters and optimizer, with betas of their own for two of them."""
    tensors = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in values.items()}
    shared = [tensor for name, tensor in tensors.items() if name not in BETAS]
    own = [{"params": [tensors[name]], "betas": betas} for name, betas in BETAS.items()]
    make = getattr(torch.optim, kind)
    return tensors, make([{"params": shared}, *own], eps=1e-8, foreach=False, **KINDS[kind])


def step_torch(tensors: dict[str, Any], optimizer: Any, step: int) -> None:
    for name, gradient in gradients(step).items():
        tensors[name].grad = None if gradient is None else torch.tensor(gradient)
    optimizer.step()


def ours(kind: str, **more: Any) -> DistNadam:
    groups = [Group(name, beta_1=b[0], beta_2=b[1]) for name, b in BETAS.items()]
    formula = "nadam" if kind == "NAdam" else "adam"
    return DistNadam(
        formula=formula,
        groups=groups,
        clocks="tensor",
        epsilon=1e-8,
        backend="local",
        **KINDS[kind],
        **more,
    )


def largest_error(found: Any, tensors: dict[str, Any]) -> float:
    return max(
        float(np.max(np.abs(found[n] - x.detach().numpy()) / np.maximum(1, np.abs(found[n]))))
        for n, x in tensors.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_frozen_and_unfrozen_and_gradients_that_are_none_have_torchs_trajectory(
    kind: str,
) -> None:
    tensors, theirs = torchs(kind, start())
    with ours(kind).build(start()) as optimizer:
        for step in range(STEPS):
            step_torch(tensors, theirs, step)
            optimizer.apply_gradients(gradients(step))
            assert largest_error(optimizer.get_params(), tensors) <= 6e-6
        assert optimizer.iterations == STEPS
        clock, _ = optimizer.shards.read(("m",))
        for index, tensor in enumerate(optimizer.shards.layout.tensors):
            state, found = theirs.state[tensors[tensor.path]], clock.of_tensor(index)
            assert int(state["step"]) == found.steps
            if kind == "NAdam":
                assert np.isclose(float(state["mu_product"]), found.product, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [5, 80])
def test_clocks_and_betas_go_to_torch_and_come_back(kind: str, done: int, tmp_path: Path) -> None:
    with ours(kind, num_shards=2).build(start()) as optimizer:
        for step in range(done):
            optimizer.apply_gradients(gradients(step))
        before = optimizer.save(tmp_path / "a")
    file = tmp_path / "file"
    export_checkpoint(before, file, to="torch")
    content = torch.load(file, weights_only=True)
    assert len(content["optimizer"]["state"]) == (4 if done > 60 else 3)
    back = import_checkpoint(file, tmp_path / "b", source_format="torch")
    assert load_checkpoint(back.path).clock == load_checkpoint(before).clock
    assert load_checkpoint(back.path).config.clocks == "tensor"
    at = {name: x.numpy() for name, x in content["model"].items()}
    tensors, theirs = torchs(kind, at)
    theirs.load_state_dict(torch_format.state_dict(load_checkpoint(before), list(SHAPES)))
    with DistNadam.restore(back.path, backend="local") as optimizer:
        for step in range(done, done + 20):
            step_torch(tensors, theirs, step)
            optimizer.apply_gradients(gradients(step))
        assert largest_error(optimizer.get_params(), tensors) <= 6e-6
    again = tmp_path / "again"
    model = {name: tensor.detach() for name, tensor in tensors.items()}
    names = [name for name in SHAPES if name not in BETAS] + list(BETAS)
    torch.save({"model": model, "optimizer": theirs.state_dict()}, again)
    config = {} if done > 60 else {"clocks": "tensor"}
    if done < 60:
        with pytest.raises(CheckpointError, match=r"'embed.weight': .* give clocks='tensor' there"):
            import_checkpoint(again, tmp_path / "c", source_format="torch", order=names)
    done_again = import_checkpoint(
        again, tmp_path / "c", source_format="torch", order=names, config=config
    )
    state = load_checkpoint(done_again.path)
    assert (state.clock.iterations, state.config.clocks) == (done + 20, "tensor")
    clocks = {name: state.clock.of_tensor(i).steps for i, name in enumerate(state.names)}
    assert clocks == {
        name: sum(gradients(step)[name] is not None for step in range(done + 20)) for name in SHAPES
    }
    own = zip(state.names, state.settings, strict=True)
    assert {name: (has.beta_1, has.beta_2) for name, (_, has) in own} == {
        "embed.weight": (0.9, 0.999),
        "body.weight": (0.9, 0.999),
        **BETAS,
    }
    if done > 60:
        with pytest.raises(ConversionError, match=r"step of .* with clocks='one' all tensors step"):
            import_checkpoint(
                again,
                tmp_path / "d",
                source_format="torch",
                order=names,
                config={"clocks": "one"},
            )


@pytest.mark.parametrize("to", ["keras", "keras3", "optax"])
def test_frameworks_of_one_clock_or_of_one_pair_of_betas_refuse_others_by_name(
    to: Any, tmp_path: Path
) -> None:
    formula = {"keras": "nadam", "keras3": "adam_keras", "optax": "adam"}[to]
    config: dict[str, Any] = {"formula": formula, "clocks": "tensor", "backend": "local"}
    with DistNadam(**config).build(start()) as optimizer:
        for step in range(3):
            optimizer.apply_gradients(gradients(step))
        path = optimizer.save(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"clocks: 'embed.weight', 'head' here after 0 steps"):
        export_checkpoint(path, tmp_path / "file", to=to)
    assert export_checkpoint(path, tmp_path / "file", to=to, lossy=True).notes
    with DistNadam(**{**config, "groups": [Group("head", beta_2=0.9)]}).build(start()) as optimizer:
        path = optimizer.save(tmp_path / "b")
    with pytest.raises(ConversionError, match=r"beta_2: 0\.9 of Group\('head', beta_2=0\.9\)"):
        export_checkpoint(path, tmp_path / "file", to=to)


@pytest.mark.parametrize("to", ["numpy", "safetensors"])
def test_our_own_files_hold_clocks(to: Any, tmp_path: Path) -> None:
    with ours("NAdam").build(start()) as optimizer:
        for step in range(3):
            optimizer.apply_gradients(gradients(step))
        before = optimizer.save(tmp_path / "a")
    export_checkpoint(before, tmp_path / "file", to=to)
    back = import_checkpoint(tmp_path / "file", tmp_path / "b", source_format=to)
    assert compare(before, back.path).same
    assert load_checkpoint(back.path).clock.of_tensor(2) == TensorClock(0, 1.0)
