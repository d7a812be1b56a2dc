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
from distnadam.backends.ray.stored_restore_points import StoredRestorePoints
from distnadam.checkpoint import store
from distnadam.errors import Rewound, Unrecoverable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
PARAMS = {"w": np.ones(100, np.float32)}


OPTIONS = {"shard_timeout_s": 20.0}
HOW: dict[str, Any] = {"num_shards": 2, "num_workers": 1, "backend": "ray"}


@pytest.mark.parametrize("roles", [["Shard"], ["Supervisor", "Shard"]], ids=" and ".join)
def test_a_change_is_in_no_checkpoint_before_its_manifest_is(
    roles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(checkpoint_dir=str(tmp_path), **OPTIONS)
    with DistNadam(name=f"settings-{len(roles)}", options=options, **HOW).build(PARAMS) as built:
        worker = built.worker(0)
        worker.step(PARAMS)
        built.save(tmp_path)
        built.set_config(lr=0.05)
        worker.step(PARAMS)
        is_written, may_end = threading.Event(), threading.Event()
        whole = store.NewCheckpoint.commit

        def commit(self: store.NewCheckpoint, records: Iterable[Any]) -> None:
            found = list(records)
            is_written.set()
            assert may_end.wait(120)
            whole(self, found)

        monkeypatch.setattr(store.NewCheckpoint, "commit", commit)
        saving = built.save(tmp_path, wait=False)
        assert is_written.wait(60)
        kill(built, roles)
        with pytest.raises(Unrecoverable, match="the configuration was replaced after round 1"):
            worker.step(PARAMS)
        may_end.set()
        assert saving.result(60)


@pytest.mark.parametrize("what", ["configuration", "state"])
def test_a_change_is_not_forgotten_by_the_death_of_all_that_knew_of_it(
    what: str, tmp_path: Path
) -> None:
    options = Options(checkpoint_dir=str(tmp_path), **OPTIONS)
    with DistNadam(name=f"all-{what}", options=options, **HOW).build(PARAMS) as built:
        worker = built.worker(0)
        worker.step(PARAMS)
        built.save(tmp_path)
        if what == "state":
            built.set_params(PARAMS)
            worker.pull()
        else:
            built.set_config(lr=0.05)
        worker.step(PARAMS)
        kill(built, ["Supervisor", "Shard 0", "Shard 1"])
        with pytest.raises(Unrecoverable, match=f"the {what} was replaced after round 1"):
            worker.step(PARAMS)


def test_what_was_saved_since_a_change_is_gone_back_to_though_all_died(tmp_path: Path) -> None:
    options = Options(checkpoint_dir=str(tmp_path), **OPTIONS)
    with DistNadam(name="all-saved", options=options, **HOW).build(PARAMS) as built:
        worker = built.worker(0)
        worker.step(PARAMS)
        built.set_config(lr=0.05)
        built.save(tmp_path)
        worker.step(PARAMS)
        expected = built.get_params()["w"].tobytes()
        kill(built, ["Supervisor", "Shard 0", "Shard 1"])
        with pytest.raises(Rewound):
            worker.step(PARAMS)
        assert built.round == 1 and built.lr == 0.05
        worker.step(PARAMS)
        assert built.get_params()["w"].tobytes() == expected


@pytest.mark.parametrize("outlives", [True, False])
def test_an_optimizer_that_has_ended_leaves_no_record(outlives: bool, tmp_path: Path) -> None:
    options = Options(checkpoint_dir=str(tmp_path), outlives=outlives)
    built = DistNadam(name=f"gone-{outlives}", options=options, **HOW).build(PARAMS)
    record = StoredRestorePoints(_run_id(built))
    assert record.read() is not None
    built.close()
    assert record.read() is None


def kill(optimizer: DistNadam, roles: list[str]) -> None:
    """Kill one process of each role."""
    pids = {address.pid for address in registry.addresses_of(_run_id(optimizer))}
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
    for role in roles:
        os.kill(next(pid for pid in pids if role in titles[pid]), signal.SIGKILL)


def _run_id(optimizer: DistNadam) -> str:
    return optimizer.shards.backend.run_id  # type: ignore[attr-defined,no-any-return]
