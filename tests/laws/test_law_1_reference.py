"""Law 1: trajectories match TensorFlow's own Keras Nadam."""

import json
from pathlib import Path

import numpy as np
import pytest

from distnadam import DistNadam

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
TENSORS = 4


def close(given: np.ndarray, expected: np.ndarray) -> None:
    assert np.all(np.abs(given - expected) <= 1e-6 * np.maximum(1.0, np.abs(expected)))


def test_all_eight_cases_are_here() -> None:
    assert len(CASES) == 8


@pytest.mark.on_ray("ray-1-clip_both", slow=["ray-3-clip_both", "ray-3-defaults"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_trajectory_is_the_references(case: str, num_shards: int, backend: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        golden = dict(data)
    config = json.loads(str(golden["config"]))
    recorded = {int(step): index for index, step in enumerate(golden["steps"])}
    params = [golden[f"param0_{i}"] for i in range(TENSORS)]
    steps = len(golden["grads_0"])
    with DistNadam(**config, num_shards=num_shards, backend=backend).build(params) as optimizer:
        for step in range(1, steps + 1):
            optimizer.apply_gradients([golden[f"grads_{i}"][step - 1] for i in range(TENSORS)])
            if step in recorded:
                for i, given in enumerate(optimizer.get_params()):
                    close(given, golden[f"params_{i}"][recorded[step]])
        weights = optimizer.get_weights()
        assert weights[0] == golden["weights_00"] == steps
        assert weights[1] == pytest.approx(float(golden["weights_01"]), rel=1e-5)
        for index in range(2, 2 + 2 * TENSORS):
            expected = golden[f"weights_{index:02d}"]
            assert np.abs(weights[index] - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_reads_as_the_references_does(case: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        config, expected = json.loads(str(data["config"])), json.loads(str(data["get_config"]))
    ours = DistNadam(**config).get_config()
    for key in ("lr", "beta_1", "beta_2", "epsilon", "schedule_decay", "clipnorm", "clipvalue"):
        assert key in ours or key not in expected
        if key in expected:
            assert ours[key] == pytest.approx(expected[key], rel=1e-6)


def test_kerass_own_weights_are_taken_and_training_goes_on_from_them() -> None:
    with np.load(GOLDEN / "defaults.npz") as data:
        golden = dict(data)
    count = sum(name.startswith("weights_") for name in golden)
    weights = [golden[f"weights_{i:02d}"] for i in range(count)]
    assert weights[1].dtype == np.float32
    with DistNadam(num_shards=2, backend="local").build(
        [golden[f"params_{i}"][-1] for i in range(TENSORS)]
    ) as optimizer:
        optimizer.set_weights(weights)
        assert optimizer.iterations == int(weights[0])
        assert all(
            np.array_equal(a, b)
            for a, b in zip(optimizer.get_weights()[2:], weights[2:], strict=True)
        )
