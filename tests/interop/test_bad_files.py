"""Malformed files: each is a CheckpointError that names file, tensor, expected and found."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from distnadam import DistNadam
from distnadam.errors import CheckpointError
from distnadam.interop import Format, export_checkpoint, import_checkpoint

Arrays = dict[str, np.ndarray]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with DistNadam(schedule_decay=1000.0, backend="local").build(
        {"b": np.ones(2, np.float32), "w": np.ones((2, 3), np.float32)}
    ) as made:
        made.apply_gradients({"b": np.ones(2, np.float32), "w": np.ones((2, 3), np.float32)})
        return Path(made.save(tmp_path / "a"))


def refused(path: Path, name: Format, message: str) -> None:
    """Assert that the import is refused in these words, names the file, and leaves nothing."""
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(path, path.parent / "never", source_format=name)
    assert str(path) in str(caught.value)
    assert not (path.parent / "never").exists()


def changed(checkpoint: Path, name: Format, change: Callable[[Arrays], object]) -> Path:
    """Write an exported npz after a change of its entries."""
    path = checkpoint.parent / f"{name}.npz"
    export_checkpoint(checkpoint, path, to=name, lossy=True)
    with np.load(path) as data:
        entries = {key: data[key].copy() for key in data.files}
    change(entries)
    np.savez(path, **entries)
    return path


def put(key: str, index: Any, value: float) -> Callable[[Arrays], object]:
    def change(entries: Arrays) -> None:
        entries[key][index] = value

    return change


def about(text: str) -> Callable[[Arrays], object]:
    return lambda entries: entries.update(
        {"about": np.array(text.replace("{", '{"is": "distnadam interop", ', 1))}
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "numpy",
            put("v/w", (1, 2), np.nan),
            r"v of 'w': expected finite float32 values, got nan at index \(1, 2\)",
        ),
        (
            "numpy",
            put("v/b", 1, -1e-9),
            r"v of 'b': a second moment must be at least 0, got -9\.99\S+ at index \(1,\)",
        ),
        ("numpy", put("params/b", 0, np.inf), "params of 'b': expected finite"),
        ("numpy", lambda e: e.pop("m/w"), "m: tensor 'w' is missing; expected 2 tensors, got 1"),
        ("numpy", lambda e: e.update({"m/x": np.ones(1)}), "m: 'x' is not a tensor of the model"),
        (
            "numpy",
            lambda e: e.update({"other": np.ones(1)}),
            "expected entries under params, m, v, got 1 others",
        ),
        (
            "numpy",
            lambda e: e.update({"m/w": np.ones((3, 2))}),
            r"m of 'w': expected shape \(2, 3\), got shape \(3, 2\)",
        ),
        (
            "numpy",
            lambda e: e.update({"m/b": np.array(["x", "y"])}),
            "m of 'b': expected floating-point numbers",
        ),
        ("numpy", lambda e: e.pop("iterations"), "step: expected one finite number"),
        (
            "numpy",
            lambda e: e.update({"iterations": np.array(-1)}),
            "step: expected a whole number of at least 0, got -1",
        ),
        (
            "numpy",
            lambda e: e.update({"iterations": np.array([1, 2])}),
            r"step: expected one finite number, got shape \(2,\)",
        ),
        (
            "numpy",
            lambda e: e.update({"m_schedule": np.array(1.5)}),
            r"m_schedule: expected a product .* got 1\.5",
        ),
        (
            "numpy",
            lambda e: e.update({"about": np.array("{}")}),
            "its description is not one that distnadam wrote",
        ),
        (
            "numpy",
            lambda e: e.update({"about": np.array("[" * 9999)}),
            "its description cannot be read as JSON",
        ),
        ("numpy", lambda e: e.update({"about": np.array(3)}), "entry 'about': expected one string"),
        ("numpy", about('{"kind": "state", "config": 3}'), "its config: expected a map, got int"),
        (
            "numpy",
            about('{"kind": "state", "config": {"beta_1": 2}}'),
            r"hyper-parameters are refused: beta_1 must be in \[0, 1\), got 2",
        ),
        (
            "numpy",
            about('{"kind": "state", "config": {"momentum": 2}}'),
            "hyper-parameters are refused: .*'momentum'",
        ),
        (
            "numpy",
            about('{"kind": "state", "layout": {"tensors": [["w", [2], "float32", 0, 3]]}}'),
            "its layout is refused",
        ),
        (
            "numpy",
            about('{"kind": "state", "layout": {"tensors": 7, "tree": 0}}'),
            "its layout is refused",
        ),
        (
            "keras",
            about('{"kind": "keras", "config": [3]}'),
            "its config: expected a map, got list",
        ),
        (
            "keras",
            lambda e: e.pop("optimizer/00005"),
            "expected iterations, m_schedule and 4 slots, got 5 arrays",
        ),
        (
            "keras",
            lambda e: e.pop("optimizer/00000"),
            "expected entries params/<path> and optimizer/00000 and on",
        ),
        ("keras", lambda e: e.pop("about"), "holds no configuration; give config"),
        ("keras", put("optimizer/00004", 0, np.nan), "v of 'b': expected finite"),
        (
            "keras3",
            lambda e: e.pop("optimizer/00006"),
            "m_schedule: expected one finite number, got shape",
        ),
        (
            "keras3",
            lambda e: [e.pop(f"optimizer/0000{i}") for i in (5, 6)],
            "expected iteration, learning_rate, 4 slots and u_product",
        ),
        ("optax", lambda e: e.pop("count"), "expected entries params/, mu/, nu/ and count"),
        ("optax", lambda e: e.pop("nu/b"), "v: tensor 'b' is missing"),
        ("optax", lambda e: e.pop("about"), "holds no configuration"),
    ],
)
def test_an_entry_that_is_wrong_is_named(
    checkpoint: Path, name: Format, change: Callable[[Arrays], object], message: str
) -> None:
    refused(changed(checkpoint, name, change), name, message)


@pytest.mark.parametrize("name", ["keras", "keras3", "optax"])
def test_a_file_of_another_kind_is_refused(checkpoint: Path, name: Format) -> None:
    path = checkpoint.parent / "file"
    export_checkpoint(checkpoint, path, to="numpy")
    refused(path, name, f"expected a file of kind '{name}', got 'state'")


@pytest.mark.parametrize("name", ["keras", "optax", "numpy"])
def test_a_truncated_npz_and_noise_are_refused_at_every_length(
    checkpoint: Path, name: Format
) -> None:
    path = checkpoint.parent / "file"
    export_checkpoint(checkpoint, path, to=name, lossy=True)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        refused(path, name, "file")
    path.write_bytes(os.urandom(5000))
    refused(path, name, "is no npz file")


def test_a_flipped_bit_in_an_npz_is_refused(checkpoint: Path) -> None:
    path = checkpoint.parent / "file"
    export_checkpoint(checkpoint, path, to="numpy")
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 130] ^= 1
    path.write_bytes(data)
    refused(path, "numpy", "entry 'params/b' cannot be read: Bad CRC-32")


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", w=np.array([{"a": 1}], object))
    refused(
        tmp_path / "file.npz", "numpy", "entry 'w' cannot be read: it holds pickled Python objects"
    )


def entry(
    path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, name: str = "w.npy"
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, data)
    return path


def header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header((1 << 50,)), "needs another number"),
        (header((-1,)), "cannot be read"),
        (header((3,)) + b"\0" * 11, "needs another number"),
        (b"\x93NUMPY\x03\x00", "array format"),
        (b"no array", "cannot be read"),
        (pickle.dumps({}), "cannot be read"),
    ],
)
def test_a_header_that_lies_costs_no_memory(data: bytes, message: str, tmp_path: Path) -> None:
    refused(entry(tmp_path / "file", data), "numpy", message)


def test_an_entry_that_grows_beyond_what_deflate_can_is_refused(tmp_path: Path) -> None:
    path = entry(
        tmp_path / "file", header((1 << 20,)) + b"\0" * (4 << 20), compression=zipfile.ZIP_BZIP2
    )
    refused(path, "numpy", "claims .* bytes from")


def test_an_entry_that_is_no_array_is_refused(tmp_path: Path) -> None:
    refused(
        entry(tmp_path / "file", b"x", name="../w.txt"),
        "numpy",
        r"entry '\.\./w\.txt': expected one \.npy array",
    )


def test_safetensors_that_are_none_or_lie_are_refused(checkpoint: Path) -> None:
    path = checkpoint.parent / "file"
    export_checkpoint(checkpoint, path, to="safetensors")
    whole = path.read_bytes()
    for data in (
        whole[:-1],
        whole[:50],
        b"",
        os.urandom(100),
        (1 << 60).to_bytes(8, "little") + whole[8:],
    ):
        path.write_bytes(data)
        refused(path, "safetensors", "cannot be read as safetensors")
    save_file({"w": np.arange(3)}, path)
    refused(
        path,
        "safetensors",
        "params: 'w': expected dtype float16, bfloat16, float32, float64, got int64",
    )
    save_file(
        {"params/w": np.ones(3, np.float32)},
        path,
        metadata={"about": '{"is": "distnadam interop", "kind": "state", "clock": 3}'},
    )
    refused(path, "safetensors", "its clock must be two numbers, got '3'")
    save_file(
        {"params/w": np.ones(3)},
        path,
        metadata={"about": '{"is": "distnadam interop", "kind": "state", "clock": [0, 1]}'},
    )
    refused(path, "safetensors", "its layout is refused")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path, "numpy", "there is no such file")
