"""Record what other libraries' optimizers compute, as data for law 1.

    .venv-interop/bin/python -m tests.golden.record --algoperf FILE

FILE is AlgoPerf's published ``pytorch_nadamw_full_budget.py``, of
github.com/mlcommons/algorithmic-efficiency, commit 2c90454, in algorithms/baselines/self_tuning.
Its class NAdamW is taken and nothing else. Each case is 200 steps of float32 on the same gradients,
from the same parameters (`inputs.npz`); a file per case in libraries/ holds our configuration, the
library's version and call, and its parameters after every twentieth step; AlgoPerf's has the
second moments too.
"""

import argparse
import ast
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch

HERE = Path(__file__).parent / "libraries"
SHAPES = [(7, 5), (5,), (3, 2, 4), ()]
STEPS, EVERY = 200, 20
LEAST = 1e-3
"""The least magnitude of a gradient's element: below, epsilon decides."""

Step = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Takes a step's gradients, returns the parameters after it."""


def inputs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the first parameters, and for each the gradients of all steps."""
    rng = np.random.default_rng(20261127)
    params = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    drawn = [rng.standard_normal((STEPS, *shape)) * 10.0 ** rng.integers(-2, 1) for shape in SHAPES]
    return params, [(np.copysign(LEAST, x) + x).astype(np.float32) for x in drawn]


def of_torch(
    make: Callable[[list[Any]], Any], *, moments: bool = False
) -> Callable[[list[np.ndarray]], Step]:
    """Return what starts a torch optimizer on parameters.

    Args:
        make: makes the optimizer of tensors.
        moments: whether a step returns the second moments after the parameters.
    """

    def start(params: list[np.ndarray]) -> Step:
        tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
        optimizer = make(tensors)

        def step(gradients: list[np.ndarray]) -> list[np.ndarray]:
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = torch.from_numpy(np.array(gradient))
            optimizer.step()
            after = [tensor.detach() for tensor in tensors]
            if moments:
                after += [optimizer.state[tensor]["exp_avg_sq"] for tensor in tensors]
            return [tensor.numpy().copy() for tensor in after]

        return step

    return start


def of_optax(transform: Any) -> Callable[[list[np.ndarray]], Step]:
    """Return what starts an optax transformation on parameters."""

    def start(params: list[np.ndarray]) -> Step:
        held = [[jnp.asarray(p) for p in params]]
        state = [transform.init(held[0])]

        def step(gradients: list[np.ndarray]) -> list[np.ndarray]:
            updates, state[0] = transform.update(
                [jnp.asarray(g) for g in gradients], state[0], held[0]
            )
            held[0] = optax.apply_updates(held[0], updates)
            return [np.asarray(p) for p in held[0]]

        return step

    return start


def of_keras(optimizer: Any) -> Callable[[list[np.ndarray]], Step]:
    """Return what starts a Keras optimizer on parameters."""

    def start(params: list[np.ndarray]) -> Step:
        variables = [keras.Variable(p) for p in params]
        optimizer.build(variables)

        def step(gradients: list[np.ndarray]) -> list[np.ndarray]:
            optimizer.apply([torch.from_numpy(np.array(g)) for g in gradients], variables)
            return [keras.ops.convert_to_numpy(v).copy() for v in variables]

        return step

    return start


def algoperf(path: Path) -> Any:
    """Return the class NAdamW of AlgoPerf's file, whose other imports need not be there."""
    names = {"NAdamW", "nadamw"}
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope: dict[str, Any] = {"torch": torch, "math": math, "Tensor": torch.Tensor, "List": list}
    exec(compile(tree, str(path), "exec"), scope)
    return scope["NAdamW"]


Case = tuple[str, str, dict[str, Any], Callable[[list[np.ndarray]], Step]]


def torch_cases() -> Iterator[Case]:
    """Yield NAdam as torch's own tests configure it, and Adam and AdamW."""
    configured: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 1e-3},
        "momentum_decay": {"momentum_decay": 6e-3},
        "weight_decay": {"weight_decay": 0.1},
        "weight_decay_momentum_decay": {"weight_decay": 0.1, "momentum_decay": 6e-3},
        "decoupled": {"weight_decay": 0.1, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
        "maximize": {"weight_decay": 0.1, "maximize": True},
    }
    for name, theirs in configured.items():
        ours = {"lr": 2e-3, "epsilon": 1e-8, "decoupled_weight_decay": False} | theirs
        ours["schedule_decay"] = ours.pop("momentum_decay", 4e-3)
        call = f"torch.optim.NAdam(**{theirs})"
        yield f"torch_nadam_{name}", call, ours, of_torch(partial_of(torch.optim.NAdam, theirs))
    for name, kind, theirs, ours in (
        ("adam", torch.optim.Adam, {"weight_decay": 0.1}, {"decoupled_weight_decay": False}),
        ("adam_plain", torch.optim.Adam, {"lr": 1e-2}, {}),
        ("adamw", torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}, {}),
    ):
        ours = {"formula": "adam", "lr": 1e-3, "epsilon": 1e-8} | theirs | ours
        call = f"torch.optim.{kind.__name__}(**{theirs})"
        yield f"torch_{name}", call, ours, of_torch(partial_of(kind, theirs))


def partial_of(kind: Any, settings: dict[str, Any]) -> Callable[[list[Any]], Any]:
    return lambda tensors: kind(tensors, **settings)


def optax_cases() -> Iterator[Case]:
    """Yield optax's two Nadams and two Adams."""
    for name, decay, formula in (
        ("nadam", 0.0, "nadam_optax"),
        ("nadamw", 0.1, "nadam_optax"),
        ("adam", 0.0, "adam"),
        ("adamw", 0.1, "adam"),
    ):
        theirs = {"learning_rate": 1e-2, "eps": 1e-7} | ({"weight_decay": decay} if decay else {})
        ours = {"formula": formula, "lr": 1e-2, "weight_decay": decay}
        yield (
            f"optax_{name}",
            f"optax.{name}(**{theirs})",
            ours,
            of_optax(getattr(optax, name)(**theirs)),
        )


def keras_cases() -> Iterator[Case]:
    """Yield Keras 3's Nadam, Adam and AdamW, with weight decay and without."""
    for name, kind, decay, ours in (
        ("nadam", "Nadam", None, {"schedule_decay": 1.0}),
        ("nadam_decay", "Nadam", 0.1, {"schedule_decay": 1.0}),
        ("adam", "Adam", None, {"formula": "adam_keras"}),
        ("adamw", "AdamW", 0.1, {"formula": "adam_keras"}),
    ):
        theirs = {"learning_rate": 1e-2} | ({} if decay is None else {"weight_decay": decay})
        yield (
            f"keras_{name}",
            f"keras.optimizers.{kind}(**{theirs})",
            {"lr": 1e-2, "weight_decay": decay or 0.0} | ours,
            of_keras(getattr(keras.optimizers, kind)(**theirs)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algoperf", type=Path, required=True)
    args = parser.parse_args()
    params, gradients = inputs()
    steps = list(range(EVERY, STEPS + 1, EVERY))
    given = {f"param0_{i}": p for i, p in enumerate(params)}
    given |= {f"grads_{i}": g for i, g in enumerate(gradients)}
    np.savez_compressed(HERE / "inputs.npz", steps=np.array(steps), **given)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.08}
    published: Case = (
        "algoperf_nadamw",
        f"AlgoPerf's NAdamW(**{settings})",
        {
            "formula": "nadam_algoperf",
            "lr": 1e-2,
            "beta_2": 0.99,
            "epsilon": 1e-8,
            "weight_decay": 0.08,
        },
        of_torch(partial_of(algoperf(args.algoperf), settings), moments=True),
    )
    versions = f"torch {torch.__version__}, optax {optax.__version__}, keras {keras.__version__}"
    for name, call, ours, start in (*torch_cases(), *optax_cases(), *keras_cases(), published):
        step, found = start(params), []
        for number in range(STEPS):
            after = step([g[number] for g in gradients])
            if number + 1 in steps:
                found.append(after)
        kinds = [f"{kind}_{i}" for kind in ("params", "second") for i in range(len(params))]
        stacked = (np.stack(rows) for rows in zip(*found, strict=True))
        arrays = dict(zip(kinds, stacked, strict=False))
        about = {"library": f"{call}; {versions}", "config": json.dumps(ours)}
        np.savez_compressed(HERE / f"{name}.npz", **about, **arrays)


if __name__ == "__main__":
    main()
