"""What each rank does that a launcher starts: trains a model, by JAX or by Keras on torch, and
writes what it saw to the directory that it is given.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

RANK = int(os.environ.get("RANK", "0"))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's batch of a step."""
    rng = np.random.default_rng([step, RANK])
    x = rng.standard_normal((16, 4)).astype(np.float32)
    return x, x.sum(1, keepdims=True)


def by_jax(seen: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp

    import distnadam

    gradient = jax.jit(jax.grad(lambda p, x, y: ((x @ p["w"] + p["b"] - y) ** 2).mean()))
    params: Any = {"w": jnp.zeros((4, 1)), "b": jnp.zeros(1)}
    optimizer = distnadam.jax.DistNadam(0.1, num_shards=2)
    for step in range(5):
        params = optimizer.step(params, gradient(params, *batch(step)))
    params = params | {"b": params["b"] + 1.0}  # as all ranks do
    for step in range(5, 8):
        params = optimizer.step(params, gradient(params, *batch(step)))
    seen["params"] = [np.asarray(params[name]).tolist() for name in "wb"]
    try:
        own = params | {"b": params["b"] + RANK}
        optimizer.step(own, gradient(own, *batch(8)))
    except distnadam.errors.RanksDisagree as error:
        seen["changed alone"] = str(error)
    rate_of_one = [0.0]
    updating = distnadam.jax.DistNadam(lambda count: 0.1 + rate_of_one[0]).transformation()

    @jax.jit
    def updated(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = updating.update(gradient(params, x, y), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    under_jit = updated(params, updating.init(params), *batch(9))
    rate_of_one[0] = float(RANK)
    try:
        jax.block_until_ready(updated(*under_jit, *batch(10)))
    except jax.errors.JaxRuntimeError as error:
        seen["under jit"] = str(error)
    rate_of_one[0] = 0.0
    under_jit = updated(*under_jit, *batch(10))
    seen["params under jit"] = [np.asarray(under_jit[0][name]).tolist() for name in "wb"]
    other: Any = {"w": jnp.full(3, float(RANK))}
    try:
        hasty = distnadam.Options(step_timeout_s=8.0)
        distnadam.jax.DistNadam(0.1, options=hasty).step(other, other)
    except distnadam.errors.StructureError as error:
        seen["other"] = str(error)
    except distnadam.errors.DistNadamError as error:
        seen["other"] = type(error).__name__


def by_keras(seen: dict[str, Any]) -> None:
    import keras

    import distnadam

    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = distnadam.keras.DistNadam(
        0.1,
        use_ema=True,
        loss_scale_factor=1024.0,
        options=distnadam.Options(on_nonfinite="skip"),
    )
    try:
        model.compile(optimizer=optimizer, loss="mse")
    except distnadam.errors.ConfigError as error:  # which names what is done next
        seen["refused"] = str(error)
    model.compile(optimizer=optimizer, loss="mse", auto_scale_loss=False)
    for step in range(8):
        x, y = batch(step)
        model.train_on_batch(x * (1e6 if (step, RANK) == (3, 1) else 1.0), y)
    seen["iterations"] = optimizer.cluster.iterations
    seen["skipped"] = optimizer.cluster.skipped
    seen["params"] = [array.tolist() for array in model.get_weights()]
    scale = distnadam.LossScale(init_scale=1024.0, growth_interval=3)
    dynamic = distnadam.keras.DistNadam(0.1, loss_scale=scale)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.set_weights([np.zeros((4, 1)), np.zeros(1)])
    model.compile(optimizer=dynamic, loss="mse", auto_scale_loss=False)
    seen["scales"] = []
    for step in range(8):
        x, y = batch(step)
        model.train_on_batch(x * (1e6 if (step, RANK) == (3, 1) else 1.0), y)
        seen["scales"].append(dynamic.cluster.loss_scale)
    seen["scaled iterations"] = dynamic.cluster.iterations
    seen["scaled"] = [array.tolist() for array in model.get_weights()]


if __name__ == "__main__":
    found: dict[str, Any] = {}
    {"jax": by_jax, "keras": by_keras}[sys.argv[1]](found)
    (Path(sys.argv[2]) / f"{RANK}.json").write_text(json.dumps(found))
