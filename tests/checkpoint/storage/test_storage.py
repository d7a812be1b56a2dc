"""Storage: the contract of a directory, missing shared disks, full disks, retention."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner

import distnadam.checkpoint.storage.remote as remote
import distnadam.runtime.shard_files as shard_files
from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.run_lock import make_run_lock
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.cli import main
from distnadam.errors import CheckpointBusy, CheckpointError
from distnadam.training.fit import fit
from distnadam.training.tasks.digits import Digits
from tests.models import bits, params, run


@pytest.fixture(params=["path", "file", "memory"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of an empty directory, as a path and as URLs."""
    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.0, 0.0))
    yield {
        "path": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://{tmp_path.name}/run",
    }[request.param]
    fsspec.filesystem("memory").store.clear()


def contents(*parts: bytes) -> Any:
    return lambda: (memoryview(part) for part in parts)


def test_a_directory_writes_reads_replaces_and_removes_files(root: str) -> None:
    directory = open_directory(root).child("below")
    assert (directory.files(), directory.directories(), directory.name) == ({}, [], "below")
    directory.make()
    with directory.hold():
        directory.write("first", contents(b"abc", b"", b"defg"))
        directory.replace("second", b"old", temporary=".t")
        directory.replace("second", b"new!", temporary=".t")
    assert directory.files() == {"first": 7, "second": 4}
    assert directory.read("second", 4) == b"new!"
    with pytest.raises(CheckpointError, match="second"):
        directory.read("second", 3)
    room = [bytearray(2), bytearray(0), bytearray(3)]
    with directory.reading("first") as read_into:
        read_into([memoryview(part) for part in room], 1)
        assert b"".join(room) == b"bcdef"
        with pytest.raises(CheckpointError, match="ends at byte 7"):
            read_into([memoryview(bytearray(9))], 2)
    with pytest.raises(CheckpointError, match=r"third: cannot be read"):
        directory.read("third", 9)
    assert open_directory(root).directories() == ["below"]
    for name in ("first", "second", "second"):
        directory.remove(name)
    directory.remove_if_empty()
    assert directory.files() == {}


def test_a_run_saves_restores_and_prunes_there(root: str) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        for step in range(4):
            run(optimizer, step, step + 1)
            path = optimizer.save(root, wait=False).result()
            assert path == f"{open_directory(root)}/step_{step + 1:08d}"
        again = optimizer.save(root)
        assert len(open_directory(again).files()) == 4
        assert [step.name for step in store.prune(root, 2, again)] == [
            "step_00000002",
            "step_00000001",
        ]
        expected = bits(optimizer)
    with DistNadam.restore(root, num_shards=2, backend="local") as other:
        assert bits(other) == expected
    open_directory(again).remove(
        next(name for name in open_directory(again).files() if name.startswith("shard"))
    )
    with pytest.raises(CheckpointError, match="is missing"):
        DistNadam.restore(again, backend="local")
    with DistNadam.restore(root, backend="local") as other:
        assert other.round == 3


def test_transient_errors_are_retried_and_a_failed_upload_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.0, 0.0))
    directory, files = open_directory("memory://flaky"), fsspec.filesystem("memory")
    failures = [OSError("try later")] * 2
    real = type(files).open

    def flaky(self: Any, path: str, mode: str = "rb", **how: Any) -> Any:
        if "w" in mode and failures:
            raise failures.pop()
        return real(self, path, mode, **how)

    monkeypatch.setattr(type(files), "open", flaky)
    directory.write("file", contents(b"abc"))
    assert (directory.read("file", 9), failures) == (b"abc", [])
    failures[:] = [OSError("try later")] * 9
    with pytest.raises(
        CheckpointError, match=r"memory://flaky/other: cannot be written: OSError: try later"
    ):
        directory.write("other", contents(b"abc"))
    assert len(failures) == 6
    assert directory.files() == {"file": 3}

    def breaking() -> Iterator[memoryview]:
        yield memoryview(b"a part")
        raise CheckpointError("the shard is gone")

    failures.clear()
    with pytest.raises(CheckpointError, match="the shard is gone"):
        directory.write("part", breaking)
    assert directory.files() == {"file": 3}


@pytest.mark.parametrize("url", ["nothing://bucket/run", "ftps3://x"])
def test_a_protocol_without_an_installed_package_is_an_error(url: str) -> None:
    with pytest.raises(CheckpointError, match="no installed package handles"):
        DistNadam.restore(url)


def test_a_directory_that_a_file_replaces_is_an_error_about_the_file_that_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*paths: Path) -> None:
        directory.path.rename(tmp_path / "away")
        directory.path.write_text("")
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory")

    directory = LocalDirectory(tmp_path / "run")
    directory.make()
    monkeypatch.setattr(os, "replace", replaced)
    with pytest.raises(CheckpointError, match=r"run/last: cannot be written: Not a directory"):
        directory.replace("last", b"x", temporary=".last")


def test_saving_from_nodes_without_a_shared_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shard_files.write_shard

    def elsewhere(directory: str, name: str, **how: Any) -> Any:
        there = tmp_path / "another node" / Path(directory).name
        if "00001-of" not in name:
            return real(directory, name, **how)
        there.mkdir(parents=True, exist_ok=True)
        return real(there, name, **how)

    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        monkeypatch.setattr(shard_files, "write_shard", elsewhere)
        for wait in (True, False):
            with pytest.raises(
                CheckpointError,
                match=r"shard-00001-of-00002.*is not here: .* save to a disk that every node",
            ):
                save(optimizer, tmp_path / "run", wait=wait)
            assert store.step_directories(tmp_path / "run") == []
        monkeypatch.setattr(
            shard_files,
            "write_shard",
            lambda directory, name, **how: real(tmp_path / "no such", name, **how),
        )
        with pytest.raises(
            CheckpointError,
            match=r"its directory is not on this node, .* save to a disk that every",
        ):
            optimizer.save(tmp_path / "run")


def save(optimizer: DistNadam, path: Path, *, wait: bool) -> str:
    saved = optimizer.save(path, wait=wait)
    return saved if isinstance(saved, str) else saved.result()


def test_a_full_disk_is_an_error_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "distnadam", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mount.returncode != 0:
        pytest.skip("no disk of a given size can be mounted here")
    try:
        with DistNadam(num_shards=2, backend="local").build(
            {"w": np.ones(30_000, np.float32)}
        ) as optimizer:
            optimizer.save(tmp_path)
            expected = bits(optimizer)
            optimizer.apply_gradients({"w": np.ones(30_000, np.float32)})
            for wait in (True, False):
                with pytest.raises(
                    CheckpointError, match=f"shard-0000.*{os.strerror(errno.ENOSPC)}"
                ):
                    save(optimizer, tmp_path, wait=wait)
                assert [step.name for step in store.step_directories(tmp_path)] == ["step_00000000"]
        with DistNadam.restore(tmp_path, backend="local") as again:
            assert bits(again) == expected
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def history(tmp_path: Path) -> list[Directory]:
    """Checkpoints of rounds 0 to 12, one saved every minute."""
    with DistNadam(backend="local").build({"w": np.ones(3)}) as optimizer:
        for number in range(13):
            directory = Path(optimizer.save(tmp_path))
            manifest = replace(store.load(directory), saved_at=60.0 * number)
            (directory / store.MANIFEST).write_bytes(manifest.to_bytes())
            optimizer.apply_gradients({"w": np.ones(3)})
    return store.step_directories(tmp_path)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [11, 12]),
        ({"keep_every": 5}, [0, 5, 10, 11, 12]),
        ({"keep_every_s": 240.0}, [0, 4, 8, 11, 12]),
        ({"keep_every": 6, "keep_every_s": 500.0}, [0, 6, 9, 11, 12]),
    ],
)
@pytest.mark.parametrize("often", [False, True], ids=["once", "after every save"])
def test_the_last_ones_and_one_in_so_many_steps_or_seconds_are_kept(
    rules: dict[str, Any], kept: list[int], often: bool, history: list[Directory], tmp_path: Path
) -> None:
    for newest in history if often else history[-1:]:
        store.prune(tmp_path, 2, newest, **rules)
    assert [store.load(step).round for step in store.step_directories(tmp_path)] == kept


def test_the_last_valid_one_is_kept_whatever_is_newer(
    history: list[Directory], tmp_path: Path
) -> None:
    for step in history[4:]:
        step.remove(store.MANIFEST)
    store.prune(tmp_path, 1, history[-1])
    assert store.find(tmp_path)[1].round == 3


def test_fit_keeps_its_checkpoints_at_a_url_and_its_records_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how: dict[str, Any] = {
        "backend": "local",
        "verbose": False,
        "checkpoint_dir": "memory://fit/run",
        "save_every": 2,
        "keep": 2,
        "keep_every": 4,
    }
    first = fit(Digits(), steps=8, **how)
    assert first.metrics_path.is_relative_to(tmp_path)
    assert first.checkpoints == [f"memory://fit/run/step_{step:08d}" for step in (2, 4, 6, 8)]
    assert [step.name for step in store.step_directories("memory://fit/run")] == [
        "step_00000004",
        "step_00000006",
        "step_00000008",
    ]
    assert fit(Digits(), steps=10, **how).resumed_from == "memory://fit/run/step_00000008"
    fsspec.filesystem("memory").store.clear()


def test_fit_keeps_a_second_run_out_of_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        make_run_lock(open_directory("memory://fit/held")),
        pytest.raises(CheckpointBusy, match="memory://fit/held: another run writes here"),
    ):
        fit(Digits(), steps=1, backend="local", verbose=False, checkpoint_dir="memory://fit/held")
    fsspec.filesystem("memory").store.clear()


def test_the_commands_take_urls(root: str, tmp_path: Path) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        optimizer.save(root)

    def run_json(*args: str) -> Any:
        done = CliRunner().invoke(main, [*args, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert (
        [v["valid"] for v in run_json("verify", root)]
        == [v["valid"] for v in run_json("verify", f"{root}/step_00000000")]
        == [True]
    )
    assert run_json("inspect", root)["checksums"] == "verified"
    run_json("export", root, str(tmp_path / "state.npz"), "--to", "numpy")
    run_json("import", str(tmp_path / "state.npz"), f"{root}/back", "--from", "numpy")
    assert run_json("diff", f"{root}/back", root)["tensors"] == []


def test_a_local_directory_is_a_path() -> None:
    directory = open_directory("file:///tmp/x")
    assert isinstance(directory, LocalDirectory)
    assert os.fspath(directory) == str(directory) == "/tmp/x"
