"""What was changed since the last whole checkpoint is not lost silently, whoever dies."""

import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.backends.ray import registry
from distnadam.checkpoint import store
from distnadam.errors import Unrecoverable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
PARAMS = {"w": np.ones(100, np.float32)}


@pytest.mark.parametrize("roles", [["Shard"], ["Supervisor", "Shard"]], ids=" and ".join)
def test_a_change_is_in_no_checkpoint_before_its_manifest_is(
    roles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(checkpoint_dir=str(tmp_path), shard_timeout_s=20.0)
    name = f"settings-{len(roles)}"
    how: dict[str, Any] = {"num_shards": 2, "num_workers": 1, "backend": "ray"}
    with DistNadam(name=name, options=options, **how).build(PARAMS) as optimizer:
        worker = optimizer.worker(0)
        worker.step(PARAMS)
        optimizer.save(tmp_path)
        optimizer.set_config(lr=0.05)
        worker.step(PARAMS)
        is_written, may_end = threading.Event(), threading.Event()
        whole = store.NewCheckpoint.commit

        def commit(self: store.NewCheckpoint, records: Iterable[Any]) -> None:
            found = list(records)
            is_written.set()
            assert may_end.wait(120)
            whole(self, found)

        monkeypatch.setattr(store.NewCheckpoint, "commit", commit)
        saving = optimizer.save(tmp_path, wait=False)
        assert is_written.wait(60)
        pids = {address.pid for address in registry.addresses_of(_run_id(optimizer))}
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
        for role in roles:
            os.kill(next(pid for pid in pids if role in titles[pid]), signal.SIGKILL)
        with pytest.raises(Unrecoverable, match="the configuration was replaced after round 1"):
            worker.step(PARAMS)
        may_end.set()
        assert saving.result(60)


def _run_id(optimizer: DistNadam) -> str:
    return optimizer.shards.backend.run_id  # type: ignore[attr-defined,no-any-return]
