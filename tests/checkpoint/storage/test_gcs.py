"""Checkpoints at gs:// URLs, over HTTP, on an emulator of Google's object store."""

import os
from collections.abc import Iterator

import pytest

from tests.checkpoint.storage.stores import saves_prunes_and_restores

# the warnings of the server and of its client are not ours
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty directory on a server that lives as long as the test."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    host, port = server._api._httpd.socket.getsockname()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    name = f"bucket-{os.urandom(4).hex()}"
    gcsfs.GCSFileSystem(project="test", token="anon").mkdir(name)
    yield f"gs://{name}/run"
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


def test_a_run_saves_prunes_and_restores_there_on_other_shards(bucket: str) -> None:
    saves_prunes_and_restores(bucket)
