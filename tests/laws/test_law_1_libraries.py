"""Law 1 beyond the reference: trajectories match torch's, optax's, Keras 3's and AlgoPerf's own
optimizers, as recorded, and the formulas in float64.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from tests.models import bits

LIBRARIES = Path(__file__).parent.parent / "golden" / "libraries"
CASES = sorted(path.stem for path in LIBRARIES.glob("*.npz") if path.stem != "inputs")
TENSORS = 4
Arrays = list[np.ndarray]


def test_all_nineteen_cases_are_here() -> None:
    assert len(CASES) == 19


@cache
def given() -> tuple[Arrays, Arrays, list[int]]:
    """The first parameters, the gradients of all steps, and the steps recorded."""
    with np.load(LIBRARIES / "inputs.npz") as data:
        params, gradients = (
            [data[f"{name}_{i}"] for i in range(TENSORS)] for name in ("param0", "grads")
        )
        return params, gradients, data["steps"].tolist()


def recorded(case: str) -> tuple[dict[str, Any], str, Arrays]:
    with np.load(LIBRARIES / f"{case}.npz") as data:
        params = [data[f"params_{i}"] for i in range(TENSORS)]
        return json.loads(str(data["config"])), str(data["library"]), params


def by_formula(
    lr: float = 0.002,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    schedule_decay: float = 0.004,
    formula: str = "nadam",
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
) -> Iterator[Arrays]:
    """Yield the parameters after each step, computed in float64 as papers write it."""
    start, gradients, _ = given()
    params = [p.astype(np.float64) for p in start]
    m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
    product = 1.0
    for t in range(1, len(gradients[0]) + 1):
        mu, mu_next = (
            beta_1 * (1 - 0.5 * 0.96 ** (n * schedule_decay)) if formula == "nadam" else beta_1
            for n in (t, t + 1)
        )
        product *= mu
        for i, gradient in enumerate(gradients):
            g = gradient[t - 1].astype(np.float64) * (-1 if maximize else 1)
            if decoupled_weight_decay:
                params[i] = params[i] - lr * weight_decay * params[i]
            else:
                g = g + weight_decay * params[i]
            m[i] = beta_1 * m[i] + (1 - beta_1) * g
            v[i] = beta_2 * v[i] + (1 - beta_2) * g * g
            v_hat = v[i] / (1 - beta_2**t)
            if formula in ("nadam", "nadam_optax"):
                ahead = mu_next * m[i] / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
            elif formula == "nadam_algoperf":
                ahead = (beta_1 * m[i] + (1 - beta_1) * g) / (1 - product)
            else:
                ahead = m[i] / (1 - product)
            below = np.sqrt(v_hat) + epsilon
            if formula == "adam_keras":
                below = np.sqrt(v_hat) + epsilon / math.sqrt(1 - beta_2**t)
            params[i] = params[i] - lr * ahead / below
        yield [p.copy() for p in params]


def trajectory(optimizer: DistNadam, num_workers: int = 1) -> Iterator[Arrays]:
    """Yield the parameters after each step, of workers that all push the recorded gradients."""
    _, gradients, _ = given()
    workers = [optimizer.worker(rank) for rank in range(num_workers)]
    for step in range(len(gradients[0])):
        tickets = [worker.push([g[step] for g in gradients]) for worker in workers]
        for ticket in tickets:
            ticket.result()
        yield optimizer.get_params()


def largest_error(found: Arrays, expected: Arrays) -> float:
    """The largest difference, as a part of max(1, |p|)."""
    return max(
        float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b))))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_trajectory_is_the_librarys_and_the_formulas(case: str) -> None:
    config, library, expected = recorded(case)
    start, _, steps = given()
    allowed = 6e-6
    if library.startswith(("optax", "keras")):  # these take powers in float32
        allowed += 2e-6 * config["lr"] * steps[-1]
    formula = by_formula(**config)
    with DistNadam(**config, backend="local").build(start) as optimizer:
        for step, params in enumerate(trajectory(optimizer), 1):
            assert largest_error(params, next(formula)) <= 3e-6
            if step in steps:
                theirs = [array[steps.index(step)] for array in expected]
                assert largest_error(params, theirs) <= allowed
        assert optimizer.iterations == steps[-1]


def test_the_second_moment_is_algoperfs() -> None:
    """The first it changes in place and back, so that it says nothing."""
    config, _, _ = recorded("algoperf_nadamw")
    start, _, steps = given()
    with np.load(LIBRARIES / "algoperf_nadamw.npz") as data:
        theirs = [data[f"second_{i}"] for i in range(TENSORS)]
    with DistNadam(**config, backend="local").build(start) as optimizer:
        for step, _ in enumerate(trajectory(optimizer), 1):
            if step not in steps:
                continue
            ours = optimizer.get_weights()[2 + TENSORS :]
            for v, recorded_v in zip(ours, theirs, strict=True):
                expected = recorded_v[steps.index(step)]
                assert np.max(np.abs(v - expected)) <= 6e-6 * np.max(np.abs(expected))


@pytest.mark.on_ray("ray-torch_adamw")
@pytest.mark.parametrize("case", ["torch_adamw", "torch_nadam_weight_decay", "keras_adamw"])
def test_three_shards_and_two_workers_end_with_the_bits_of_one_process(
    case: str, backend: str
) -> None:
    config, _, _ = recorded(case)
    start, _, _ = given()
    found = []
    for shape in (
        {"backend": "local"},
        {"backend": backend, "num_shards": 3, "num_workers": 2},
    ):
        with DistNadam(**config, **shape).build(start) as optimizer:
            for _ in trajectory(optimizer, optimizer.get_config()["num_workers"]):
                pass
            found.append(bits(optimizer))
    assert found[0] == found[1]
