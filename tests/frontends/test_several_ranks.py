"""Two processes that a launcher starts train one model by JAX, and by Keras."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from tests.frontends.ranks_script import batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]


def launched(kind: str, directory: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw, which are started as torchrun starts them."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(os.getpid())}
    common |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    common |= {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3"}
    script = str(ROOT / "tests/frontends/ranks_script.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, kind, str(directory)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=350)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_of_a_jax_script_step_by_the_mean_of_their_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax")
    first, second = launched("jax", tmp_path)
    assert first["params"] == second["params"]
    params = {"w": np.zeros((4, 1), np.float32), "b": np.zeros(1, np.float32)}
    with DistNadam(0.1, epsilon=1e-8, formula="nadam_optax", backend="local") as reference:
        reference.build(params)
        for step in range(8):
            if step == 5:
                reference.set_params(params | {"b": params["b"] + np.float32(1.0)})
                params = reference.get_params()
            gradients = []
            for rank in range(2):
                monkeypatch.setattr("tests.frontends.ranks_script.RANK", rank)
                x, y = batch(step)
                error = 2 * (x @ params["w"] + params["b"] - y) / len(x)
                gradients.append({"w": x.T @ error, "b": error.sum(0)})
            mean = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in params}
            reference.apply_gradients(mean)
            params = reference.get_params()
    for found, name in zip(first["params"], "wb", strict=True):
        np.testing.assert_allclose(found, params[name], rtol=1e-4, atol=1e-5)
    assert first["changed alone"] == second["changed alone"]
    assert "rank 0 changed nothing, rank 1 changed 'b' (" in first["changed alone"]
    assert "RanksDisagree: round 2 was refused" in first["under jit"], first["under jit"]
    assert "RanksDisagree: round 2 was refused" in second["under jit"]
    assert first["params under jit"] == second["params under jit"] != first["params"]
    assert "does not begin as on rank 0" in second["other"]
    assert first["other"] != second["other"]


def test_ranks_of_a_keras_script_in_half_precision_skip_alike_where_one_alone_overflows(
    tmp_path: Path,
) -> None:
    pytest.importorskip("keras")
    first, second = launched("keras", tmp_path)
    assert first["params"] == second["params"]
    assert first["iterations"] == second["iterations"] == 7
    assert first["skipped"] == second["skipped"] == 1
    assert np.isfinite(first["params"][0]).all()
    assert "auto_scale_loss=False, and this optimizer loss_scale=" in first["refused"]
    scales = [1024.0, 1024.0, 2048.0, 1024.0, 1024.0, 1024.0, 2048.0, 2048.0]
    assert first["scales"] == second["scales"] == scales
    assert first["scaled"] == second["scaled"]
    assert first["scaled iterations"] == second["scaled iterations"] == 7
    assert (np.array(first["scaled"][0]) > 0.3).all()
