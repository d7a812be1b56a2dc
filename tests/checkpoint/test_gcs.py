"""Checkpoints at gs:// URLs, over HTTP: an emulator of Google's object store on this machine."""

import os
from collections.abc import Iterator

import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.places import place
from tests.models import bits, params, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the warnings of the server and of its client are not ours


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder on a server that lives as long as the test."""
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


def test_a_run_saves_restores_and_prunes_there(bucket: str) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        for step in range(3):
            run(optimizer, step, step + 1)
            optimizer.save(bucket, wait=False)
        again = optimizer.save(bucket)  # the same step a second time, where nothing can be renamed
        expected = bits(optimizer)
    assert [step.name for step in store.prune(bucket, 2, again)] == ["step_00000001"]
    assert len(place(again).files()) == 4
    with DistNadam.restore(bucket, num_shards=2, backend="local") as optimizer:
        assert bits(optimizer) == expected
