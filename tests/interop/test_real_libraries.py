"""The real libraries continue from our exports, and we from their states, to float32 rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distnadam import DistNadam
from distnadam.cli import main
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
    TfKerasLegacy,
    Torch,
    close,
    go_on_here,
    in_names,
    params,
    trained,
)

pytestmark = pytest.mark.slow


def exported(checkpoint: str, tmp_path: Path, to: Format) -> Any:
    return export_checkpoint(checkpoint, tmp_path / f"theirs.{to}", to=to)


@pytest.mark.parametrize("config", [{}, {"schedule_decay": 0.05, "epsilon": 1e-8, "beta_1": 0.8}])
def test_torch_goes_on_from_an_export_as_we_do(config: dict[str, float], tmp_path: Path) -> None:
    import torch

    checkpoint = trained(tmp_path, **config)
    done = exported(checkpoint, tmp_path, "torch")
    content = torch.load(done.path, weights_only=True)
    there = Torch({name: tensor.numpy() for name, tensor in content["model"].items()})
    there.optimizer.load_state_dict(content["optimizer"])
    ours, optimizer = go_on_here(checkpoint, 25)
    close(in_names(there.run(25, 35)), in_names(ours))
    slots = there.optimizer.state_dict()["state"]
    assert [int(slots[i]["step"]) for i in range(3)] == [35, 35, 35]
    _, m_schedule, *moments = optimizer.get_weights()
    close(
        [slots[i]["exp_avg"] for i in range(3)] + [slots[i]["exp_avg_sq"] for i in range(3)],
        moments,
    )
    assert float(slots[0]["mu_product"]) == pytest.approx(float(m_schedule), rel=1e-5)


def test_torchs_order_of_parameters_is_followed(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path)
    order = ["scale", "bias", "kernel"]
    there = Torch(
        {
            name: np.asarray(load_checkpoint(Path(checkpoint)).params[NAMES.index(name)])
            for name in order
        }
    )
    there.optimizer.load_state_dict(
        torch_format.state_dict(load_checkpoint(Path(checkpoint)), order)
    )
    close(in_names(there.run(25, 35)), in_names(go_on_here(checkpoint, 25)[0]))


def train_norms(model: Any, optimizer: Any, steps: range) -> list[list[np.ndarray]]:
    """Train a model of layers of one size, and return the gradients of each step."""
    import torch

    found = []
    for step in steps:
        rng = np.random.default_rng([7, step])
        x, y = (torch.tensor(rng.standard_normal((8, 6)), dtype=torch.float32) for _ in range(2))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        found.append([p.grad.numpy().copy() for p in model.parameters()])
        optimizer.step()
    return found


@pytest.mark.parametrize("command", [False, True], ids=["by the library", "by the command"])
def test_a_module_goes_on_from_an_export_without_an_order(command: bool, tmp_path: Path) -> None:
    import torch

    def make() -> Any:
        torch.manual_seed(0)
        layers = [torch.nn.LayerNorm(6), torch.nn.Tanh(), torch.nn.LayerNorm(6)]
        return torch.nn.Sequential(*layers)

    through, file = make(), tmp_path / "out.pt"
    names = list(dict(through.named_parameters()))
    settings = {"lr": 0.05, "eps": 1e-7, "momentum_decay": 0.004}
    there = torch.optim.NAdam(through.parameters(), **settings)
    with DistNadam(lr=0.05, backend="local").build(dict(make().named_parameters())) as optimizer:
        for gradients in train_norms(through, there, range(5)):
            optimizer.apply_gradients(dict(zip(names, gradients, strict=True)))
        optimizer.save(tmp_path / "run")
    if command:
        done = CliRunner().invoke(main, ["export", f"{tmp_path}/run", str(file), "--to", "torch"])
        assert done.exit_code == 0, done.output
    else:
        export_checkpoint(tmp_path / "run", file, to="torch")
    content = torch.load(file, weights_only=True)
    model = make()
    model.load_state_dict(content["model"])
    ours = torch.optim.NAdam(model.parameters())
    ours.load_state_dict(content["optimizer"])
    train_norms(through, there, range(5, 15))
    train_norms(model, ours, range(5, 15))
    for one, other in zip(model.parameters(), through.parameters(), strict=True):
        assert (one - other).abs().max() <= 2**-21  # moments of weight and bias swapped: 0.01

    torch.save({"model": model.state_dict(), "optimizer": ours.state_dict()}, file)
    back = load_checkpoint(import_checkpoint(file, tmp_path / "b", source_format="torch").path)
    assert [back.names[i] for i in back.positions(None)] == names
    state = torch_format.state_dict(back)["state"]
    assert all(
        torch.equal(state[i][key], ours.state_dict()["state"][i][key])
        for i in range(4)
        for key in ("exp_avg", "exp_avg_sq")
    )


def test_we_go_on_from_torchs_state_as_it_does(tmp_path: Path) -> None:
    import torch

    there = Torch(params(), lr=0.01, momentum_decay=0.02)
    there.run(0, 25)
    torch.save(
        {
            "model": {n: t.detach() for n, t in there.tensors.items()},
            "optimizer": there.optimizer.state_dict(),
        },
        tmp_path / "t.pt",
    )
    done = import_checkpoint(tmp_path / "t.pt", tmp_path / "back", source_format="torch")
    ours, optimizer = go_on_here(done.path, 25)
    assert optimizer.iterations == 35
    assert optimizer.get_config()["epsilon"] == 1e-8
    close(in_names(there.run(25, 35)), in_names(ours))


@pytest.mark.parametrize("config", [{}, {"schedule_decay": 0.05, "epsilon": 1e-6}])
def test_tf_keras_legacy_goes_on_from_an_export_as_we_do(
    config: dict[str, float], tmp_path: Path
) -> None:
    checkpoint = trained(tmp_path, **config)
    state = load_checkpoint(Path(checkpoint))
    settings = keras.config(state)
    there = TfKerasLegacy(
        dict(zip(NAMES, state.params, strict=True)), learning_rate=settings.pop("lr"), **settings
    )
    there.load(keras.weights(state))
    ours, optimizer = go_on_here(checkpoint, 25)
    close(in_names(there.run(25, 35)), in_names(ours))
    # the reference rounds 1 - beta_2 to float32
    close(there.optimizer.get_weights()[2:], optimizer.get_weights()[2:], rel=2e-5)


def test_we_go_on_from_tf_keras_legacys_weights_as_it_does(tmp_path: Path) -> None:
    there = TfKerasLegacy(params(), learning_rate=0.01)
    values = there.run(0, 25)
    given = {f"params/{name}": value for name, value in values.items()}
    given |= {
        f"optimizer/{i:05d}": weight for i, weight in enumerate(there.optimizer.get_weights())
    }
    np.savez(tmp_path / "k.npz", **given)
    done = import_checkpoint(
        tmp_path / "k.npz",
        tmp_path / "back",
        source_format="keras",
        config=there.optimizer.get_config(),
    )
    ours, optimizer = go_on_here(done.path, 25)
    assert optimizer.iterations == 35
    close(in_names(there.run(25, 35)), in_names(ours))


def test_keras_3_goes_on_from_an_export_as_we_do(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, schedule_decay=1.0)
    state = load_checkpoint(Path(checkpoint))
    there = Keras3(dict(zip(NAMES, state.params, strict=True)), **keras.config_of_keras_3(state))
    there.load(keras.variables(state))
    ours, optimizer = go_on_here(checkpoint, 25)
    close(in_names(there.run(25, 35)), in_names(ours))
    assert int(there.optimizer.iterations) == optimizer.iterations == 35


# Keras's own get_config warns
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_we_go_on_from_keras_3s_variables_as_it_does(tmp_path: Path) -> None:
    there = Keras3(params(), learning_rate=0.01)
    there.run(0, 25)
    np.savez(tmp_path / "k.npz", **there.entries())
    done = import_checkpoint(
        tmp_path / "k.npz",
        tmp_path / "back",
        source_format="keras3",
        config=there.optimizer.get_config(),
    )
    ours, optimizer = go_on_here(done.path, 25)
    assert (optimizer.iterations, optimizer.get_config()["schedule_decay"]) == (35, 1.0)
    close(in_names(there.run(25, 35)), in_names(ours))


def test_we_go_on_from_optaxs_state_as_it_does_and_give_it_back(tmp_path: Path) -> None:
    there = Optax(params(), learning_rate=0.01)
    there.run(0, 25)
    np.savez(tmp_path / "o.npz", **there.entries())
    done = import_checkpoint(
        tmp_path / "o.npz", tmp_path / "back", source_format="optax", config={"learning_rate": 0.01}
    )
    ours, optimizer = go_on_here(done.path, 25)
    assert optimizer.iterations == 35
    expected = there.run(25, 35)
    close(in_names(expected), in_names(ours))

    back = load_checkpoint(Path(optimizer.save(tmp_path / "later")))
    again = Optax(ours, **optax.config(back))
    again.state = optax.opt_state(back, again.state)
    close(in_names(again.run(35, 45)), in_names(there.run(35, 45)))
    assert export_checkpoint(tmp_path / "later", tmp_path / "o2.npz", to="optax").notes == ()
