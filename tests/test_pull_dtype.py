"""`pull_dtype`: every worker sees the float32 masters rounded to bfloat16, and nobody else does."""

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from distnadam import DistNadam, Options, fit
from distnadam.errors import ConfigError, NoSuchSetting
from distnadam.interop import export_checkpoint
from distnadam.tensors.arrays import BFLOAT16

W = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
PARAMS = {
    "w": W,
    "kernel": W[:1200].reshape(30, 40),
    "scalar": np.float32(1 / 3),
    "empty": np.zeros((0, 3), np.float32),
    "half": W[:50].astype(np.float16),
    "brain": W[:50].astype(BFLOAT16),
    "wide": W[:70].astype(np.float64) / 3,
}
ROUNDED = [name for name in PARAMS if name != "wide"]


def built(backend: str = "local", **how: Any) -> DistNadam:
    how = {"num_shards": 3, "lr": 0.1, "pull_dtype": "bfloat16"} | how
    return DistNadam(backend=backend, **how).build(PARAMS)


def masters(optimizer: DistNadam) -> dict[str, Any]:
    layout = optimizer.shards.layout
    flat = optimizer.shards.read(("params",))[1]["params"]
    return dict(zip((t.path for t in layout.tensors), layout.views(flat), strict=True))


def check_seen(seen: dict[str, Any], optimizer: DistNadam) -> None:
    """Require the masters' nearest bfloat16s, in arrays that cannot be written."""
    for name, master in masters(optimizer).items():
        dtype = BFLOAT16 if name in ROUNDED else np.float64
        leaf = seen[name]
        assert (leaf.dtype, leaf.shape) == (dtype, np.shape(PARAMS[name]))
        assert leaf.tobytes() == master.astype(dtype).tobytes(), name
        assert isinstance(leaf, np.generic) or not leaf.flags.writeable
    w = masters(optimizer)["w"]
    assert not np.array_equal(w, w.astype(BFLOAT16)), "the masters are not rounded"


@pytest.mark.on_ray("ray-auto")
@pytest.mark.parametrize("transport", ["auto", "objects"])
def test_pull_step_parameters_and_tickets_show_each_worker_the_rounded_masters(
    transport: Any, backend: str
) -> None:
    with built(backend, options=Options(transport=transport)) as optimizer:
        worker = optimizer.worker(0)
        check_seen(worker.pull(), optimizer)
        check_seen(worker.step(PARAMS), optimizer)
        check_seen(worker.parameters(), optimizer)
        worker.push(PARAMS).result()
        check_seen(worker.pull(), optimizer)
        optimizer.apply_gradients(PARAMS)
        check_seen(worker.pull(), optimizer)
        optimizer.reshard(2)
        check_seen(worker.pull(), optimizer)
        check_seen(worker.step(worker.pull()), optimizer)
        check_seen(optimizer.worker(0).pull(), optimizer)


def test_where_pages_cannot_be_protected_workers_get_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(os, "memfd_create", refuse)
    with built() as optimizer:
        worker = optimizer.worker(0)
        check_seen(worker.pull(), optimizer)
        check_seen(worker.step(PARAMS), optimizer)


def test_views_of_a_round_stay_until_the_next_but_one_and_copy_nothing() -> None:
    with built() as optimizer:
        worker = optimizer.worker(0)
        first = worker.pull()["w"]
        before = first.tobytes()
        second = worker.step(PARAMS)["w"]
        assert first.tobytes() == before != second.tobytes()
        assert worker.parameters()["w"].ctypes.data == second.ctypes.data
        third = worker.step(PARAMS)["w"]
        assert third.ctypes.data == first.ctypes.data, "two buffers alternate"
        whole = optimizer.shards.backend.transport.memory.read[0]["float32"]
        assert np.shares_memory(first, whole)
        assert whole.nbytes == 2 * sum(np.size(PARAMS[name]) for name in ROUNDED)


def test_the_state_is_the_masters_and_what_is_set_is_not_rounded(tmp_path: Path) -> None:
    with built() as optimizer:
        worker = optimizer.worker(0)
        got = optimizer.get_params()
        assert all(got[name].tobytes() == PARAMS[name].tobytes() for name in PARAMS)
        worker.step(PARAMS)
        stepped = masters(optimizer)
        path = optimizer.save(tmp_path)
        optimizer.set_params(PARAMS)
        check_seen(worker.pull(), optimizer)
        assert optimizer.get_params()["w"].tobytes() == W.tobytes()
    with DistNadam.restore(path, num_shards=1, backend="local") as restored:
        check_seen(restored.worker(0).pull(), restored)
        assert {k: v.tobytes() for k, v in masters(restored).items()} == {
            k: v.tobytes() for k, v in stepped.items()
        }


def test_an_exported_checkpoint_holds_the_masters(tmp_path: Path) -> None:
    with DistNadam(backend="local", pull_dtype="bfloat16").build({"w": W}) as optimizer:
        optimizer.worker(0).step({"w": W})
        path, stepped = optimizer.save(tmp_path), optimizer.get_params()["w"]
    export_checkpoint(path, tmp_path / "w.npz", to="numpy", slots=False)
    with np.load(tmp_path / "w.npz") as exported:
        assert exported["w"].tobytes() == stepped.tobytes()


def test_a_background_save_and_a_refused_round_leave_what_workers_see(tmp_path: Path) -> None:
    with built(options=Options(on_nonfinite="skip")) as optimizer:
        worker = optimizer.worker(0)
        handle = optimizer.save(tmp_path, wait=False)
        worker.step(PARAMS)
        handle.result()
        check_seen(worker.pull(), optimizer)
        before = masters(optimizer)["w"].tobytes()
        bad = PARAMS | {"w": np.full_like(W, np.nan)}
        check_seen(worker.step(bad), optimizer)
        assert masters(optimizer)["w"].tobytes() == before and optimizer.skipped == 1


def test_numbers_beyond_bfloat16_and_its_subnormals_are_rounded_as_ieee_754_says() -> None:
    finite = np.float32([3.4e38, -3.4e38, 3.38e38, 1e-45, -1e-40, 9.2e-41, 0.0, -0.0, 1 + 2**-8])
    with DistNadam(backend="local", pull_dtype="bfloat16").build([finite]) as optimizer:
        with np.errstate(all="raise"):
            seen = optimizer.worker(0).pull()[0]
        found = seen.astype(np.float32)
        assert found[:2].tolist() == [np.inf, -np.inf] and np.isfinite(found[2])
        assert (
            found[3:8].tobytes()
            == np.float32([0, -1e-40, 9.2e-41, 0, -0.0])
            .astype(BFLOAT16)
            .astype(np.float32)
            .tobytes()
        )
        assert found[8] == 1.0, "ties go to even"
        assert optimizer.get_params()[0].tobytes() == finite.tobytes()


def test_a_model_of_float64_is_seen_as_it_is() -> None:
    with DistNadam(backend="local", pull_dtype="bfloat16").build([np.ones(5)]) as optimizer:
        assert optimizer.worker(0).step([np.ones(5)])[0].dtype == np.float64


class Rounded:
    """Requires rounded parameters where gradients are computed, and masters where it evaluates."""

    def init(self, seed: int) -> dict[str, Any]:
        return {"w": W}

    def batch(self, step: int, rank: int, world_size: int) -> None:
        return None

    def loss_and_gradients(self, params: Any, batch: None) -> tuple[float, Any]:
        assert params["w"].dtype == BFLOAT16
        return 0.0, {"w": params["w"]}

    def evaluate(self, params: Any) -> dict[str, float]:
        assert params["w"].dtype == np.float32
        return {"lost": float(np.abs(params["w"] - params["w"].astype(BFLOAT16)).max())}


def test_fit_trains_on_rounded_parameters_and_evaluates_and_resumes_the_masters(
    tmp_path: Path,
) -> None:
    def train(steps: int, pull_dtype: Any, run: str) -> Any:
        return fit(
            Rounded(),
            steps=steps,
            optimizer=DistNadam(pull_dtype=pull_dtype),
            backend="local",
            checkpoint_dir=tmp_path / run,
            verbose=False,
        )

    whole = train(4, "bfloat16", "whole")
    assert whole.metrics["lost"] > 0
    train(2, "bfloat16", "parts")
    with pytest.raises(ConfigError, match="pull_dtype"):
        train(4, None, "parts")
    train(4, "bfloat16", "parts")
    ends = [
        DistNadam.restore(tmp_path / run, backend="local").get_params()["w"].tobytes()
        for run in ("whole", "parts")
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("float16", "'float16': numbers beyond 65504 would be infinite in float16"),
        (np.float16, "65504"),
        ("float32", "'float32'; None is each tensor's own"),
        ("bf16", "'bf16'"),
        ("", "''"),
        (16, "16"),
        (np.ones(2), "array"),
        (ml_dtypes.bfloat16, "bfloat16'>; give its name, a str"),
        (np.dtype(ml_dtypes.bfloat16), "give its name, a str"),
    ],
    ids=str,
)
def test_any_other_dtype_is_refused_by_name(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match="pull_dtype must be None or 'bfloat16', got ") as refused:
        DistNadam(pull_dtype=given)
    assert told in str(refused.value)


def test_the_setting_is_kept_in_the_config_and_not_assigned() -> None:
    optimizer = built(pull_dtype=np.str_("bfloat16"))
    config = optimizer.get_config()
    assert config["pull_dtype"] == "bfloat16" and type(config["pull_dtype"]) is str
    assert DistNadam.from_config(config).get_config() == config
    assert DistNadam().get_config().get("pull_dtype") is None
    with pytest.raises(NoSuchSetting, match="pull_dtype"):
        optimizer.pull_dtype = None  # type: ignore[attr-defined]
    optimizer.close()
