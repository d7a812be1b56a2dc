"""Checkpoints as files: readable by others, verified to the last bit, committed whole or not."""

import contextlib
import dataclasses
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import CHUNK_BYTES, Manifest, Position, shard_file_name
from distnadam.checkpoint.shard_file import read_shard, verify_files, write_shard
from distnadam.checkpoint.storage import local
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.config import Settings
from distnadam.errors import CheckpointBusy, CheckpointError
from distnadam.nadam.step_scalars import Clock
from distnadam.tensors.arrays import STATE_ARRAYS
from distnadam.tensors.layout import Layout
from tests.checkpoint.manifests import SAVE_ID, manifest_of
from tests.models import bits, params, run


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two steps on three shards."""
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        run(optimizer, 0, 2)
        return Path(optimizer.save(tmp_path, data={"position": 7}))


def shard_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("shard-*.safetensors"))


def test_any_safetensors_reader_opens_the_files_and_they_make_up_the_state(saved: Path) -> None:
    manifest = store.load(saved)
    with DistNadam.restore(saved, backend="local") as optimizer:
        weights = optimizer.get_weights()
        whole = np.concatenate(
            [load_file(saved / record.name)["m.float32"] for record in manifest.files]
        )
        expected = [
            w.reshape(-1)
            for w, t in zip(weights[2:8], manifest.layout["tensors"], strict=True)
            if t[2] != "float64"
        ]
        assert whole.tobytes() == np.concatenate(expected).tobytes()
        assert optimizer.restored_data == {"position": 7}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("flip")
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        checkpoint = Path(optimizer.save(root))
    victim = data.draw(st.sampled_from(sorted(checkpoint.iterdir())))
    content = bytearray(victim.read_bytes())
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    content[position // 8] ^= 1 << position % 8
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=victim.name):
        store.verify(checkpoint)
    with pytest.raises(CheckpointError, match=victim.name):
        DistNadam.restore(checkpoint, num_shards=3, backend="local")


def spoil_missing(path: Path) -> None:
    path.unlink()


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def spoil_swapped(path: Path) -> None:
    other = next(
        p for p in shard_files(path.parent) if p != path and p.stat().st_size != path.stat().st_size
    )
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_truncated, spoil_longer, spoil_swapped])
def test_a_file_that_is_not_the_one_written_is_refused_by_name(
    spoil: Callable[[Path], None], saved: Path
) -> None:
    victim = shard_files(saved)[0]
    spoil(victim)
    with pytest.raises(CheckpointError, match=victim.name):
        DistNadam.restore(saved, num_shards=1, backend="local")


def test_a_checkpoint_without_a_manifest_does_not_exist_and_a_named_one_is_strict(
    saved: Path,
) -> None:
    (saved / store.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.msgpack: cannot be read"):
        DistNadam.restore(saved, backend="local")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        DistNadam.restore(saved.parent, backend="local")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        DistNadam.restore(saved.parent / "nothing", backend="local")


def test_a_directory_means_its_newest_valid_checkpoint(tmp_path: Path) -> None:
    with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
        for step in range(3):
            run(optimizer, step, step + 1)
            optimizer.save(tmp_path)
    spoil_truncated(shard_files(tmp_path / "step_00000003")[0])
    path, manifest, passed_over = store.find(tmp_path)
    assert (path.name, manifest.round) == ("step_00000002", 2)
    assert "step_00000003" in passed_over[0]
    with pytest.raises(CheckpointError, match="step_00000003"):
        DistNadam.restore(tmp_path / "step_00000003", backend="local")


def test_saving_the_same_round_again_replaces_it_whole(tmp_path: Path) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        first = Path(optimizer.save(tmp_path))
        before = shard_files(first)
        optimizer.set_params(params(seed=1))
        assert Path(optimizer.save(tmp_path)) == first
        assert not set(before) & set(shard_files(first))
        assert len(shard_files(first)) == 2
        with DistNadam.restore(first, backend="local") as again:
            assert bits(again) == bits(optimizer)


@pytest.mark.parametrize("moment", ["first shard", "last shard", "before the manifest"])
def test_a_save_killed_leaves_the_previous_checkpoint_and_no_part_looks_whole(
    moment: str, tmp_path: Path
) -> None:
    with DistNadam(num_shards=3, backend="local", options=None).build(params()) as optimizer:
        before = bits(optimizer)
        optimizer.save(tmp_path)
        child = os.fork()
        if child == 0:  # a real process, killed for real in the middle of its save
            _die_at(moment)
            optimizer.shards.step(params())
            optimizer.save(tmp_path)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
    path, _, passed_over = store.find(tmp_path)
    assert path.name == "step_00000000"
    assert all("manifest" in sentence for sentence in passed_over)
    with DistNadam.restore(tmp_path, backend="local") as again:
        assert bits(again) == before


def _die_at(moment: str) -> None:
    import distnadam.runtime.shard_files as shard_files

    def die(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "before the manifest":
        store.commit = die
        return
    real = shard_files.write_shard
    index = "00000-of" if moment == "first shard" else "00002-of"

    def write(directory: Path, name: str, **how: Any) -> Any:
        record = real(directory, name, **how)
        return die() if index in name else record

    shard_files.write_shard = write


class _Sticky(LocalDirectory):
    """A directory whose files cannot be removed."""

    def child(self, name: str) -> "_Sticky":
        return _Sticky(self.path / name)

    def remove(self, name: str) -> None:
        raise CheckpointError(f"{self.path / name}: cannot be removed: it is sticky")


def test_a_save_is_whole_though_files_of_an_earlier_save_cannot_be_removed(tmp_path: Path) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        optimizer.save(tmp_path)
        again = optimizer.save(_Sticky(tmp_path))
    assert len(list(Path(again).glob("shard-*"))) == 4
    store.verify(again)


def test_a_save_that_fails_after_its_commit_keeps_what_it_has_committed(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="late"):
        _commit_then_fail(tmp_path)
    store.verify(tmp_path / "step_00000000")


def _commit_then_fail(root: Path) -> None:
    layout = Layout.of({"w": np.ones(3, np.float32)})
    state = {name: {"float32": np.ones(3, np.float32)} for name in ("params", "m", "v")}
    manifest = Manifest.of(Settings(), layout, Position(clock=Clock(), round=0), {})
    with store.new_checkpoint(root, manifest) as new:
        name, ranges = new.file_name(0, 1), {"float32": (0, 3)}
        new.commit([write_shard(new.directory, name, ranges=ranges, state=state)])
        raise KeyError("late")


def test_a_full_disk_is_an_error_and_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut, for other processes
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        optimizer.save(tmp_path)
        optimizer.apply_gradients(params())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(CheckpointError, match=f"shard-0000.*{os.strerror(errno.EFBIG)}"):
                optimizer.save(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, kept)
        assert not (tmp_path / "step_00000001").exists()
        assert store.find(tmp_path)[0].name == "step_00000000"
        assert Path(optimizer.save(tmp_path)).name == "step_00000001"


def test_pruning_keeps_the_newest_and_never_counts_one_without_a_manifest(tmp_path: Path) -> None:
    with DistNadam(backend="local").build({"w": np.ones(3)}) as optimizer:
        for _ in range(5):
            optimizer.apply_gradients({"w": np.ones(3)})
            optimizer.save(tmp_path)
    (tmp_path / "step_00000005" / store.MANIFEST).unlink()
    deleted = store.prune(tmp_path, 2, store.step_directories(tmp_path)[-1])
    assert [path.name for path in deleted] == ["step_00000002", "step_00000001"]
    assert [path.name for path in store.step_directories(tmp_path)] == [
        "step_00000003",
        "step_00000004",
        "step_00000005",
    ]


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        DistNadam(backend="local").build({"w": np.ones(3)}) as optimizer,
        pytest.raises(CheckpointError, match="cannot be made"),
    ):
        optimizer.save(tmp_path / "file" / "below")


@given(sizes=st.lists(st.integers(0, 400_000), min_size=1, max_size=4), cut=st.integers(0, 400_000))
@settings(max_examples=20, deadline=None)
def test_ranges_over_many_chunks_come_back_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cut: int
) -> None:
    directory = tmp_path_factory.mktemp("chunks")
    rng = np.random.default_rng(1)
    whole = {name: rng.standard_normal(sum(sizes)).astype(np.float32) for name in STATE_ARRAYS}
    bounds = np.cumsum([0, *sizes])
    records = []
    for index, (begin, end) in enumerate(
        zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ):
        state = {name: {"float32": values[begin:end]} for name, values in whole.items()}
        name = shard_file_name(index, len(sizes), SAVE_ID)
        records.append(write_shard(directory, name, ranges={"float32": (begin, end)}, state=state))
    manifest = manifest_of(records)
    cut = min(cut, sum(sizes))
    for begin, end in ((0, cut), (cut, sum(sizes))):
        got = read_shard(
            directory, manifest, ranges={"float32": (begin, end)}, leftovers=range(len(sizes))
        )
        for name, values in whole.items():
            assert np.array_equal(got[name]["float32"], values[begin:end])
    assert all(len(r.checksums) == -(-r.size // CHUNK_BYTES) for r in records)


MANGLED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    st.lists,
    max_leaves=5,
)


@given(raw=st.binary(max_size=300))
@settings(max_examples=200)
def test_bytes_that_are_no_manifest_are_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here"):
        Manifest.from_bytes(raw, "here")


@given(data=st.data(), value=MANGLED)
@settings(max_examples=200, deadline=None)
def test_a_manifest_with_a_mangled_field_is_refused_or_taken_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    import xxhash

    root = tmp_path_factory.getbasetemp() / "mangled"
    if not root.exists():
        with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
            optimizer.save(root)
    envelope = msgpack.unpackb((root / "step_00000000" / store.MANIFEST).read_bytes())
    body = msgpack.unpackb(envelope["body"], strict_map_key=False)
    node, key = body, data.draw(st.sampled_from(sorted(body)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(
            st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node)))
        )
    try:
        node[key] = value
        envelope["body"] = msgpack.packb(body)
    except (OverflowError, ValueError):
        return
    envelope["checksum"] = xxhash.xxh3_128_hexdigest(envelope["body"])
    with contextlib.suppress(CheckpointError):  # no other error may come out
        Manifest.from_bytes(msgpack.packb(envelope), "here")


def test_two_saves_of_one_round_at_once_are_one_checkpoint_and_one_refusal(tmp_path: Path) -> None:
    busy = pytest.raises(CheckpointBusy, match="another save is writing it")
    with (
        DistNadam(backend="local").build(params()) as optimizer,
        store.writing(tmp_path / "step_00000000"),
        busy,
    ):
        optimizer.save(tmp_path)
    with DistNadam(backend="local").build(params()) as optimizer:
        assert store.verify(Path(optimizer.save(tmp_path)))
        with pytest.raises(
            CheckpointError, match="is a checkpoint; save to the directory that holds it"
        ):
            optimizer.save(tmp_path / "step_00000000")


def test_what_somebody_writes_is_not_pruned_and_what_is_removed_first_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "step_00000000"
    with DistNadam(backend="local").build(params()) as optimizer:
        optimizer.save(tmp_path)
        optimizer.apply_gradients(params())
        newest = Path(optimizer.save(tmp_path))
        with store.writing(step):
            assert store.prune(tmp_path, 1, newest) == [] and store.verify(step)
        assert [path.name for path in store.prune(tmp_path, 1, newest)] == [step.name]
    locked, removed = local.lock, []

    def removed_before(descriptor: int, path: Path) -> bool:
        if not removed:
            removed.append(path.rmdir())  # by who held it, between it was opened and locked
        return locked(descriptor, path)

    monkeypatch.setattr(local, "lock", removed_before)
    with DistNadam(backend="local").build(params()) as optimizer:
        assert store.verify(Path(optimizer.save(tmp_path))).round == 0
    assert removed


def test_one_that_cannot_be_pruned_stays_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that was mounted read-only, or in a bucket where one may not delete."""
    unlink = os.unlink

    def refused(path: Any, **how: Any) -> None:
        if "step_00000002" in str(path):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, **how)

    with DistNadam(backend="local").build({"w": np.ones(3)}) as optimizer:
        for _ in range(4):
            optimizer.apply_gradients({"w": np.ones(3)})
            newest = optimizer.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        deleted = store.prune(tmp_path, 1, newest)
    assert [path.name for path in deleted] == ["step_00000003", "step_00000001"]
    assert "stays: " in caplog.text and "cannot be removed: Operation not permitted" in caplog.text
    assert [path.name for path in store.prune(tmp_path, 1, newest)] == ["step_00000002"]


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_reader_beside_one_that_prunes_or_replaces_finds_the_newest(
    tmp_path: Path, replaced: bool
) -> None:
    """Whoever loads a checkpoint that is removed or replaced meanwhile gets the newest of then."""
    with DistNadam(num_shards=2, backend="local").build(params()) as writer:
        for _ in range(2):
            writer.apply_gradients(params())
            writer.save(tmp_path)
        loaded = []

        def load(directory: Directory, manifest: Manifest) -> int:
            if not loaded:
                if not replaced:
                    writer.apply_gradients(params())
                loaded.append(saved := Path(writer.save(tmp_path)))
                if not replaced:
                    for old in store.step_directories(tmp_path):
                        if old.name == directory.name:
                            store.remove(old)
                assert saved.name == f"step_{2 if replaced else 3:08d}"
            verify_files(directory, manifest)
            return manifest.round

        assert store.load_first_valid(tmp_path, load) == (2 if replaced else 3)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "config",
            lambda v: {k: x for k, x in v.items() if k != "lr"},
            "its config is refused: KeyError: 'lr'",
        ),
        ("config", lambda v: {**v, "more": 1}, "its config is refused: TypeError"),
        (
            "options",
            lambda v: {"more": 1},
            "its options is refused: ConfigError: options: there is no option 'more'",
        ),
        ("ledger", lambda v: {"runs": 5, "newest": []}, "its ledger is refused: TypeError"),
        (
            "ledger",
            lambda v: {"runs": [], "newest": [[0, "x"]]},
            "its ledger is refused: ValueError",
        ),
    ],
)
def test_a_manifest_that_was_put_together_by_hand_is_refused_by_field(
    field: str, change: Any, message: str, saved: Path
) -> None:
    manifest = store.load(saved)
    made = dataclasses.replace(manifest, **{field: change(getattr(manifest, field))})
    (saved / store.MANIFEST).write_bytes(made.to_bytes())
    with pytest.raises(CheckpointError, match=message):
        DistNadam.restore(saved, backend="local")


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(saved: Path) -> None:
    victim = shard_files(saved)[0]
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(CheckpointError, match=f"{victim.name}: is missing, or no file"):
        store.verify(saved)


def test_a_manifest_from_before_sum_group_means_that_rank_is_added_to_rank(tmp_path: Path) -> None:
    with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
        saved = Path(optimizer.save(tmp_path))
    manifest = store.load(saved)
    older = {key: value for key, value in manifest.config.items() if key != "sum_group"}
    raw = dataclasses.replace(manifest, config=older).to_bytes()
    (saved / store.MANIFEST).write_bytes(raw)
    assert b"sum_group" not in raw
    assert store.load(saved).config == manifest.config
    with DistNadam.restore(saved, backend="local") as restored:
        assert restored.get_config()["sum_group"] == 1
