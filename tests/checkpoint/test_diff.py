"""A diff finds what differs: bits, ulps and indices by tensor; settings and structure by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Group
from distnadam.checkpoint.diff import compare
from distnadam.errors import CheckpointError
from tests import models


def saved(root: Path, params: Any, *, steps: int = 0, num_shards: int = 1, **config: Any) -> Path:
    with DistNadam(**config, num_shards=num_shards, backend="local").build(params) as optimizer:
        for step in range(steps):
            optimizer.apply_gradients(models.gradients(step, 0))
        return Path(optimizer.save(root))


def test_checkpoints_of_one_state_are_the_same_whatever_their_shards(tmp_path: Path) -> None:
    found = compare(
        *(saved(tmp_path / str(n), models.params(), steps=2, num_shards=n) for n in (1, 3))
    )
    assert found.same
    assert found.to_dict()["tensors"] == ()


def test_one_bit_is_found_with_its_index(tmp_path: Path) -> None:
    changed = models.params()
    changed["dense"]["kernel"][3, 5] = np.nextafter(changed["dense"]["kernel"][3, 5], np.float32(9))
    found = compare(
        saved(tmp_path / "a", models.params(), num_shards=2), saved(tmp_path / "b", changed)
    )
    (tensor,) = found.tensors
    assert (tensor.path, tensor.array, tensor.count, tensor.elements) == (
        "dense/kernel",
        "params",
        1,
        6300,
    )
    assert (tensor.max_ulp, tensor.first_index) == (1, (3, 5))
    assert tensor.max_abs == abs(tensor.first[0] - tensor.first[1]) > 0


@pytest.mark.parametrize(
    ("a", "b", "max_abs", "max_ulp"),
    [
        (1.0, -1.0, 2.0, 2 * 0x3F800000 + 1),
        (0.0, -0.0, 0.0, 1),
        (np.float32(1e-45), 0.0, float(np.float32(1e-45)), 1),
        (3e38, -3e38, 2 * float(np.float32(3e38)), 2 * int(np.float32(3e38).view(np.uint32)) + 1),
    ],
)
def test_ulps_are_counted_across_zero(
    a: float, b: float, max_abs: float, max_ulp: int, tmp_path: Path
) -> None:
    paths = [
        saved(tmp_path / name, [np.array([value, 7], np.float32)])
        for name, value in (("a", a), ("b", b))
    ]
    (tensor,) = compare(*paths).tensors
    assert (tensor.max_abs, tensor.max_ulp, tensor.first_index) == (max_abs, max_ulp, (0,))


def test_differing_settings_clocks_and_moments_are_reported(tmp_path: Path) -> None:
    found = compare(
        saved(tmp_path / "a", models.params(), steps=1),
        saved(tmp_path / "b", models.params(), steps=2, lr=0.1),
    )
    assert found.settings["config.lr"] == (0.002, 0.1)
    assert found.settings["iterations"] == (1, 2)
    assert {(t.path, t.array) for t in found.tensors} >= {
        ("half", "m"),
        ("layers/0", "v"),
        ("layers/1/0", "params"),
    }
    assert not any(t.path == "layers/1/1" for t in found.tensors)


def test_tensors_of_one_side_or_of_another_shape_are_reported(tmp_path: Path) -> None:
    one = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32), "c": np.ones(2, np.float32)}
    other = {"a": np.ones(3, np.float64), "b": np.zeros(2, np.float32), "d": np.ones(1, np.float32)}
    found = compare(saved(tmp_path / "a", one), saved(tmp_path / "b", other))
    assert found.structure == (
        "'a' is float32 (3,) in the first, float64 (3,) in the second",
        "'c' is only in the first",
        "'d' is only in the second",
    )
    assert [(t.path, t.array) for t in found.tensors] == [("b", "params")]


def test_many_tensors_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distnadam.checkpoint.diff._BATCH", 4)
    params = {f"{i:02d}": np.full(3, i, [np.float32, np.float64][i % 2]) for i in range(11)}
    changed = {
        name: value + (name in ("04", "09")) for name, value in params.items() if name != "02"
    }
    found = compare(saved(tmp_path / "a", params, num_shards=2), saved(tmp_path / "b", changed))
    assert [t.path for t in found.tensors] == ["04", "09"]


def test_a_flipped_bit_is_refused_and_not_compared(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", models.params())
    victim = next(path.glob("shard-*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match="do not have their checksum"):
        compare(path, saved(tmp_path / "b", models.params()))


def test_groups_that_differ_are_named_one_by_one(tmp_path: Path) -> None:
    still, rest = Group("dense/**", trainable=False), Group("half", lr_scale=0.5)
    both = [
        saved(tmp_path / "a", models.params(), groups=[still, rest]),
        saved(tmp_path / "b", models.params(), groups=[still, Group("half", lr_scale=0.25)]),
        saved(tmp_path / "c", models.params(), groups=[rest, still]),
        saved(tmp_path / "d", models.params(), groups=[still]),
    ]
    half = {"pattern": "half", "lr_scale": 0.5}
    assert compare(both[0], both[1]).settings == {
        "config.groups['half']": (half, {"pattern": "half", "lr_scale": 0.25})
    }
    assert compare(both[0], both[3]).settings == {"config.groups['half']": (half, None)}
    order = [still.to_dict(), half]
    assert compare(both[0], both[2]).settings == {"config.groups": (order, order[::-1])}
