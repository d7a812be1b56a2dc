"""Checkpoints at s3:// URLs, over HTTP, on an emulator of S3."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.errors import CheckpointError
from tests.checkpoint.storage.stores import saves_prunes_and_restores
from tests.models import bits, params, run

# the warnings of the server and of its client are not ours
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty directory on a server that lives as long as the test."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in (settings | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{os.urandom(4).hex()}"  # the server's module keeps buckets over the tests
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/run"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_saves_prunes_and_restores_there_on_other_shards(bucket: str) -> None:
    saves_prunes_and_restores(bucket)


def test_a_checkpoint_there_goes_on_here(bucket: str, tmp_path: Path) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        there = optimizer.save(bucket)
    with DistNadam.restore(bucket, num_shards=2, backend="local") as optimizer:
        here = optimizer.save(tmp_path)
    assert [f.ranges for f in store.verify(here).files] != [
        f.ranges for f in store.verify(there).files
    ]


def test_an_upload_that_is_cut_off_never_looks_complete(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distnadam.checkpoint.storage.remote as remote

    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.0,))
    directory = open_directory(bucket).child("cut")

    def cut() -> Iterator[memoryview]:
        yield memoryview(bytes(60 << 20))  # more than one part of a multipart upload
        raise ConnectionError("the line is gone")

    with pytest.raises(
        CheckpointError,
        match=r"/run/cut/file: cannot be written: ConnectionError: the line is gone",
    ):
        directory.write("file", cut)
    assert directory.files() == {}


def save_and_restore_on_ray(bucket: str) -> None:
    """Save there from the shards of a Ray of this process's own, and restore on other shards."""
    with DistNadam(num_shards=2, num_workers=2, backend="ray").build(params()) as optimizer:
        run(optimizer, 0, 2)
        saved: Any = optimizer.save(bucket, wait=False)
        expected = bits(optimizer)
        with DistNadam.restore(saved.result(), num_shards=3, backend="ray") as again:
            assert bits(again) == expected


@pytest.mark.nightly
def test_shards_on_ray_write_and_read_there(bucket: str) -> None:
    # in a process with a Ray of its own: workers of one that runs already do not know the server
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.storage.test_s3", bucket],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_bucket_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import distnadam.checkpoint.storage.remote as remote

    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.0,))
    with pytest.raises(CheckpointError, match="s3://nowhere/run"):
        DistNadam.restore("s3://nowhere/run", backend="local")


if __name__ == "__main__":
    save_and_restore_on_ray(sys.argv[1])
