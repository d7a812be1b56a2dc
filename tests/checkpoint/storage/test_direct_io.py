"""Writing past the page cache gives the same file, whatever its alignment and file system."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from distnadam.checkpoint.storage import direct_io


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name)


def written(path: Path, pieces: list[bytes]) -> bytes:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        direct_io.write_pieces(descriptor, map(memoryview, pieces))
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, 4097, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 5]
)
@pytest.mark.parametrize("piece", [4096, 1_000_003])
def test_a_file_is_what_was_given(folder: Path, size: int, piece: int) -> None:
    contents = os.urandom(size)
    assert (
        written(folder / "file", [contents[at : at + piece] for at in range(0, size, piece)])
        == contents
    )


def test_a_direct_write_that_is_cut_short_or_refused_continues_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, real, calls = os.urandom(9 << 20), os.write, []

    def unwilling(descriptor: int, view: memoryview) -> int:
        calls.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        if len(calls) == 2:
            return real(descriptor, view[:4096])
        if calls[-1] and len(calls) > 2:
            raise OSError(22, "Invalid argument")
        return real(descriptor, view)

    monkeypatch.setattr(os, "write", unwilling)
    assert written(tmp_path / "file", [contents]) == contents
    assert calls[2:] == [False] * len(calls[2:])


def test_what_the_system_refuses_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            direct_io.write_pieces(descriptor, [memoryview(bytes(10))])
    finally:
        os.close(descriptor)
