"""Saving behind the training: a snapshot of one round, one save at a time, errors told at the next
call and at the end.
"""

import os
import pickle
import signal
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distnadam.runtime.shard_files as shard_files
from distnadam import DistNadam, waiting
from distnadam.checkpoint import store
from distnadam.errors import CheckpointBusy, CheckpointError, Rewound, ShardLost, StepTimeout
from distnadam.protocol.messages import Pause
from distnadam.runtime import snapshot
from tests.client.conftest import Said
from tests.models import bits, params, run


class WriteGate:
    """Holds the writing of shards' files until it is opened; they fail with its error, if any."""

    def __init__(self) -> None:
        self.opened, self.begun = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def __call__(self, write: Callable[..., Any], *args: Any, **how: Any) -> Any:
        self.begun.set()
        assert self.opened.wait(60)
        if self.error is not None:
            raise self.error
        return write(*args, **how)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteGate]:
    gate, write = WriteGate(), shard_files.write_shard
    monkeypatch.setattr(shard_files, "write_shard", lambda *args, **how: gate(write, *args, **how))
    yield gate
    gate.opened.set()


def test_a_checkpoint_is_of_the_round_it_was_asked_in_though_training_goes_on(
    gate: WriteGate, tmp_path: Path
) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        run(optimizer, 0, 2)
        before = bits(optimizer)
        saving = optimizer.save(tmp_path, wait=False, data={"position": 2})
        run(optimizer, 2, 5)
        assert not saving.done()
        assert store.step_directories(tmp_path) and not list(tmp_path.glob("*/manifest.msgpack"))
        with pytest.raises(StepTimeout, match="was not complete in"):
            saving.result(timeout_s=0.01)
        gate.opened.set()
        assert saving.result() == str(tmp_path / "step_00000002")
        assert saving.done()
    with DistNadam.restore(tmp_path, num_shards=2, backend="local") as again:
        assert bits(again) == before
        assert again.restored_data == {"position": 2}


@pytest.mark.on_ray(slow=["ray-False"])
@pytest.mark.parametrize("wait", [True, False])
def test_a_checkpoint_has_the_learning_rate_of_its_round_though_set_after_the_call_of_save(
    backend: str, wait: bool, tmp_path: Path
) -> None:
    with DistNadam(lr=0.5, num_shards=2, backend=backend).build(params()) as optimizer:
        other = optimizer if backend == "local" else pickle.loads(pickle.dumps(optimizer))
        optimizer.apply_gradients(params(1))
        shards = optimizer.shards
        real = shards.boundary

        def boundary() -> Any:
            shards.boundary = real  # type: ignore[method-assign]
            other.lr = 0.25
            return real()

        shards.boundary = boundary  # type: ignore[method-assign, assignment]
        saved = optimizer.save(tmp_path, wait=wait)
        path = saved if isinstance(saved, str) else saved.result()
        assert store.load(path).config["lr"] == 0.25
        optimizer.apply_gradients(params(2))
        expected = bits(optimizer)
    with DistNadam.restore(tmp_path, backend="local") as again:
        again.apply_gradients(params(2))
        assert bits(again) == expected


CHANGES: dict[str, Callable[[DistNadam], object]] = {
    "a step": lambda optimizer: optimizer.apply_gradients(params(1)),
    "a worker's step": lambda optimizer: run(optimizer, 0, 1),
    "new parameters": lambda optimizer: optimizer.set_params(params(2)),
    "a reshard": lambda optimizer: (optimizer.reshard(2), optimizer.apply_gradients(params(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_change_the_arrays_waits_until_they_are_copied(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = threading.Event()

    class Slow:
        full = staticmethod(np.full)

        @staticmethod
        def copyto(target: Any, source: Any) -> None:
            assert opened.wait(60)
            np.copyto(target, source)

    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        optimizer.apply_gradients(params(3))
        before = bits(optimizer)
        monkeypatch.setattr(snapshot, "np", Slow)
        saving = optimizer.save(tmp_path, wait=False)
        assert bits(optimizer) == before, "reading waits for nothing"
        with ThreadPoolExecutor(1) as pool:
            changing = pool.submit(CHANGES[change], optimizer)
            with pytest.raises(TimeoutError):
                changing.result(timeout=0.3)
            opened.set()
            changing.result()
        saving.result()
        assert bits(optimizer) != before
    with DistNadam.restore(tmp_path, backend="local") as again:
        assert bits(again) == before


@pytest.mark.on_ray
def test_a_second_save_waits_for_the_first_and_keeps_its_own_round(
    backend: str, tmp_path: Path
) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        kept = []
        for step in range(3):
            run(optimizer, step, step + 1)
            kept.append((bits(optimizer), optimizer.save(tmp_path, wait=False)))
    for step, (expected, saving) in enumerate(kept):
        with DistNadam.restore(saving.result(), num_shards=3, backend="local") as again:
            assert (again.round, bits(again)) == (step + 1, expected)


def test_an_error_is_told_once_at_the_next_call_that_changes_or_saves(
    gate: WriteGate, tmp_path: Path
) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        gate.error = CheckpointError("shard-0: the disk is full")
        saving = optimizer.save(tmp_path, wait=False)
        gate.opened.set()
        assert not saving.wait()
        optimizer.get_params()
        with pytest.raises(CheckpointError, match="the disk is full"):
            optimizer.apply_gradients(params())
        optimizer.apply_gradients(params())
        assert list(tmp_path.iterdir()) == []
        gate.error = None
        assert optimizer.save(tmp_path) == str(tmp_path / "step_00000001")


def test_an_error_that_nobody_was_told_comes_at_the_end(gate: WriteGate, tmp_path: Path) -> None:
    gate.error = CheckpointError("shard-0: the disk is full")
    gate.opened.set()
    optimizer = DistNadam(backend="local").build(params())
    optimizer.save(tmp_path, wait=False)
    with pytest.raises(CheckpointError, match="the disk is full"):
        optimizer.close()
    optimizer.close()


def test_an_error_that_was_told_is_not_told_again_and_never_hides_what_ended_the_block(
    gate: WriteGate, tmp_path: Path
) -> None:
    gate.error = CheckpointError("shard-0: the disk is full")
    gate.opened.set()
    with (
        DistNadam(backend="local").build(params()) as optimizer,
        pytest.raises(CheckpointError, match="full"),
    ):
        optimizer.save(tmp_path, wait=False).result()
    with pytest.raises(KeyError, match="mine"):
        fail_while_saving(tmp_path)


def fail_while_saving(root: Path) -> None:
    with DistNadam(backend="local").build(params()) as optimizer:
        optimizer.save(root, wait=False)
        raise KeyError("mine")


def test_an_interrupt_while_waiting_for_a_save_does_not_lose_it(
    gate: WriteGate, tmp_path: Path
) -> None:
    optimizer = DistNadam(num_shards=2, backend="local").build(params())
    saving = optimizer.save(tmp_path, wait=False)
    assert gate.begun.wait(60)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        optimizer.save(tmp_path)  # waits for the first
    threading.Timer(0.1, gate.opened.set).start()
    optimizer.close()
    assert saving.result() == str(tmp_path / "step_00000000")


def test_closing_waits_for_the_checkpoint(gate: WriteGate, tmp_path: Path) -> None:
    optimizer = DistNadam(num_shards=2, backend="local").build(params())
    optimizer.save(tmp_path, wait=False)
    threading.Timer(0.1, gate.opened.set).start()
    optimizer.close()
    assert store.verify(tmp_path / "step_00000000").round == 0


def test_nobody_else_writes_that_checkpoint_meanwhile(gate: WriteGate, tmp_path: Path) -> None:
    with (
        DistNadam(backend="local").build(params()) as first,
        DistNadam(backend="local").build(params()) as second,
    ):
        first.save(tmp_path, wait=False)
        with pytest.raises(CheckpointBusy, match="another save is writing it"):
            second.save(tmp_path)
        gate.opened.set()


def test_the_memory_for_snapshots_is_kept(tmp_path: Path) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        optimizer.save(tmp_path, wait=False).result()
        hosts = optimizer.shards.backend.transport.hosts  # type: ignore[attr-defined]
        before = [h.files.snapshots.memory["m"]["float32"].ctypes.data for h in hosts]
        optimizer.apply_gradients(params())
        optimizer.save(tmp_path, wait=False).result()
        assert [h.files.snapshots.memory["m"]["float32"].ctypes.data for h in hosts] == before


def test_a_change_after_the_snapshot_is_not_taken_for_saved(
    gate: WriteGate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistNadam(backend="local").build(params()) as optimizer:
        supervisor, told = optimizer.shards.backend.supervisor, list[Any]()
        begin = supervisor.replacement_begun

        def begun(what: str) -> int:
            told.append(("begun", when := begin(what)))
            return when

        def written(checkpoint: Any, taken: int, *, is_whole: bool) -> None:
            told.append(("whole" if is_whole else "written", taken))

        monkeypatch.setattr(supervisor, "replacement_begun", begun)
        monkeypatch.setattr(supervisor, "checkpoint_written", written)
        optimizer.set_params(params(1))
        saving = optimizer.save(tmp_path, wait=False)
        optimizer.set_params(params(2))
        gate.opened.set()
        saving.result()
        optimizer.save(tmp_path)
        first, second = (when for what, when in told if what == "begun")
        early, early_whole, late, late_whole = (when for what, when in told if what != "begun")
        assert first < early == early_whole < second < late == late_whole


def test_a_snapshot_is_only_taken_of_held_shards() -> None:
    from distnadam.errors import IllegalMessage
    from distnadam.protocol.messages import Collect, Save

    with DistNadam(backend="local").build(params()) as optimizer:
        shards = optimizer.shards
        with pytest.raises(IllegalMessage, match="legal only between Pause and Resume"):
            shards.ask(
                {0: Save(token="nobody", directory="directory", file_name="file", behind=True)}
            )
        with pytest.raises(ShardLost, match="has been replaced since"):
            shards.ask({0: Collect("file")})
        shards.ask({0: Pause("me")})


@pytest.mark.nightly
def test_a_shard_that_dies_meanwhile_fails_the_save_and_leaves_the_checkpoint_before(
    tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    with DistNadam(num_shards=2, num_workers=2, backend="ray").build(params()) as optimizer:
        run(optimizer, 0, 1)
        optimizer.save(tmp_path)
        expected = bits(optimizer)
        run(optimizer, 1, 2)
        shards = optimizer.shards
        real = shards.ask

        def ask(messages: Any, timeout_s: float | None = None) -> Any:
            if "Collect" in {type(message).__name__ for message in messages.values()}:
                actor = shards.backend.actors[1]  # type: ignore[attr-defined]
                ray.kill(actor)
                with pytest.raises(ray.exceptions.RayActorError):
                    ray.get(actor.linger.remote())
            return real(messages, timeout_s)

        shards.ask = ask  # type: ignore[method-assign]
        saving = optimizer.save(tmp_path, wait=False)
        with pytest.raises(
            CheckpointError, match=r"step_00000002: a shard died before its file was written"
        ) as caught:
            saving.result()
        assert isinstance(caught.value.__cause__, ShardLost)
        assert [step.name for step in store.step_directories(tmp_path)] == ["step_00000001"]
        shards.ask = real  # type: ignore[method-assign]
        with pytest.raises(Rewound, match="to round 1"):
            optimizer.save(tmp_path, wait=False)
        assert store.verify(optimizer.save(tmp_path, wait=False).result()).round == 1
    with DistNadam.restore(tmp_path / "step_00000001", backend="local") as again:
        assert bits(again) == expected


def test_the_first_save_after_reserve_allocates_no_copy_of_the_state(tmp_path: Path) -> None:
    with DistNadam(num_shards=2, backend="local").build(
        {"w": np.ones(10**6, np.float32)}
    ) as optimizer:
        optimizer.reserve()
        tracemalloc.start()
        try:
            optimizer.save(tmp_path, wait=False).result()
            assert tracemalloc.get_traced_memory()[1] < 2 * 10**6  # the state has 12
        finally:
            tracemalloc.stop()


def test_a_save_that_lasts_is_said_with_what_the_shards_do(
    gate: WriteGate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: Said,
) -> None:
    monkeypatch.setattr(waiting, "REPORT_WAIT_S", 0.01)
    with (
        DistNadam(backend="local").build(params()) as optimizer,
        ThreadPoolExecutor(1) as pool,
    ):
        saving = pool.submit(optimizer.save, tmp_path)
        assert gate.begun.wait(60)
        assert optimizer.shards.reports.busy() == "shards 0 read, write or copy their state"
        assert said.wait(60)
        gate.opened.set()
        saving.result()
    assert said.messages[0].startswith(f"save to {tmp_path}: has waited 0.01 s, shards 0 ")


@pytest.mark.parametrize(
    "wait",
    [
        lambda optimizer, saving, root: saving.result(),
        lambda optimizer, saving, root: saving.result(timeout_s=60),
        lambda optimizer, saving, root: saving.wait(),
        lambda optimizer, saving, root: optimizer.save(root / "next"),
        lambda optimizer, saving, root: optimizer.reshard(1),
        lambda optimizer, saving, root: optimizer.close(),
    ],
    ids=["result", "result with a timeout", "wait", "next save", "reshard", "close"],
)
def test_whoever_waits_long_for_a_save_in_the_background_is_told_for_which_shards(
    wait: Callable[[DistNadam, Any, Path], object],
    gate: WriteGate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: Said,
) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        saving = optimizer.save(tmp_path, wait=False)
        monkeypatch.setattr(waiting, "REPORT_WAIT_S", 0.01)
        opening = threading.Thread(target=lambda: said.wait(60) and gate.opened.set())
        opening.start()
        wait(optimizer, saving, tmp_path)
        opening.join()
    assert said.messages[0].startswith(
        "checkpoint of round 0: has waited 0.01 s, for shards 0, 1; it waits on"
    )
