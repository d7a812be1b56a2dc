"""Restoring onto any number of shards: each chunk is read once, and only where it is needed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import CHUNK_BYTES, Manifest, shard_file_name
from distnadam.checkpoint.shard_file import (
    fill_shard,
    leftover_readers,
    read_shard,
    write_shard,
)
from distnadam.checkpoint.storage.base import ReadInto
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.config import Options
from distnadam.errors import CheckpointError, ShardLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Pull, Push, ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import STATE_ARRAYS, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from tests.checkpoint.manifests import SAVE_ID, manifest_of
from tests.models import bits, params, run

SHAPES = st.lists(
    st.tuples(st.sampled_from(["float32", "float64"]), st.integers(0, 6000)), min_size=1, max_size=6
)


def write_checkpoint(
    directory: Path, layout: Layout, cuts: Sequence[Ranges], whole: dict[str, Any]
) -> Manifest:
    """Write the files of shards with these ranges, and return a manifest that names them."""
    records = []
    for index, ranges in enumerate(cuts):
        state = {
            name: {s: flat[s][begin:end] for s, (begin, end) in ranges.items()}
            for name, flat in whole.items()
        }
        records.append(
            write_shard(
                directory,
                shard_file_name(index, len(cuts), SAVE_ID),
                ranges=ranges,
                state=state,
            )
        )
    return manifest_of(records, layout.to_dict())


class RecordingDirectory(LocalDirectory):
    """A local directory that records each read as (file, offset, bytes)."""

    best_read_bytes = CHUNK_BYTES

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[ReadInto]:
        with super().reading(name) as read_into:

            def recorded(views: Sequence[memoryview], offset: int) -> None:
                self.reads.append((name, offset, sum(map(len, views))))
                read_into(views, offset)

            yield recorded


@pytest.mark.parametrize("examples", [20, pytest.param(60, marks=pytest.mark.nightly)])
def test_any_number_of_shards_becomes_any_other_and_each_chunk_is_verified_by_one(
    examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @given(shapes=SHAPES, before=st.integers(1, 64), after=st.integers(1, 64))
    @settings(max_examples=examples)
    def check(shapes: list[tuple[str, int]], before: int, after: int) -> None:
        layout = Layout.of({f"t{i}": np.zeros(n, dtype) for i, (dtype, n) in enumerate(shapes)})
        rng, directory = np.random.default_rng(0), tmp_path_factory.mktemp("elastic")
        whole = {
            name: {s: rng.standard_normal(n).astype(s) for s, n in layout.sizes.items()}
            for name in STATE_ARRAYS
        }
        manifest = write_checkpoint(directory, layout, layout.cuts(before), whole)
        recording = RecordingDirectory(directory)

        def read_all() -> None:
            for ranges, left in zip(
                layout.cuts(after), leftover_readers(manifest, after), strict=True
            ):
                got = read_shard(recording, manifest, ranges=ranges, leftovers=left)
                for name, flat in whole.items():
                    assert all(
                        np.array_equal(got[name][s], flat[s][begin:end])
                        for s, (begin, end) in ranges.items()
                    )

        read_all()
        assert {(name, offset // CHUNK_BYTES) for name, offset, _ in recording.reads} == {
            (record.name, n) for record in manifest.files for n in range(len(record.checksums))
        }
        victim = manifest.files[rng.integers(len(manifest.files))]
        with open(directory / victim.name, "r+b") as file:
            file.seek(rng.integers(victim.size))
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(CheckpointError, match=rf"{victim.name}: bytes \["):
            read_all()

    check()


def test_a_shard_reads_its_range_rounded_out_to_chunks_and_no_more(tmp_path: Path) -> None:
    layout = Layout.of({"w": np.zeros(3_000_000, np.float32)})
    whole = {name: {"float32": np.arange(3_000_000, dtype=np.float32)} for name in STATE_ARRAYS}
    manifest = write_checkpoint(tmp_path, layout, layout.cuts(3), whole)
    recording = RecordingDirectory(tmp_path)
    for ranges, left in zip(layout.cuts(5), leftover_readers(manifest, 5), strict=True):
        recording.reads.clear()
        begin, end = ranges["float32"]
        read_shard(recording, manifest, ranges=ranges, leftovers=left)
        pieces = 2 * len(STATE_ARRAYS)  # each array lies in two old files at most
        rounding = 2 * pieces * CHUNK_BYTES  # a piece is rounded out at both ends
        assert sum(size for *_, size in recording.reads) <= 12 * (end - begin) + rounding


def test_what_is_read_goes_to_the_arrays_themselves_with_no_second_copy_of_the_state(
    tmp_path: Path,
) -> None:
    import tracemalloc

    layout = Layout.of({"w": np.zeros(4_000_000, np.float32)})
    whole = {name: {"float32": np.arange(4_000_000, dtype=np.float32)} for name in STATE_ARRAYS}
    manifest = write_checkpoint(tmp_path, layout, layout.cuts(3), whole)
    state = {name: empty_flat(layout.sizes) for name in STATE_ARRAYS}
    tracemalloc.start()
    fill_shard(tmp_path, manifest, ranges=layout.cuts(1)[0], state=state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.33 * layout.array_bytes
    assert all(
        np.array_equal(state[name]["float32"], whole[name]["float32"]) for name in STATE_ARRAYS
    )


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(1, 16, marks=pytest.mark.nightly), (16, 3)]
)
def test_a_run_on_ray_goes_on_with_other_shards(
    before: int, after: int, tmp_path: Path, ray_cluster: None
) -> None:
    with DistNadam(num_shards=before, num_workers=2, backend="local").build(params()) as optimizer:
        run(optimizer, 0, 2)
        optimizer.save(tmp_path)
        expected = bits(optimizer)
    with DistNadam.restore(tmp_path, num_shards=after, backend="ray") as optimizer:
        assert bits(optimizer) == expected


def test_a_load_that_fails_leaves_a_shard_that_serves_nothing_and_can_load_another(
    tmp_path: Path,
) -> None:
    for name in ("bad", "good"):
        with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
            run(optimizer, 0, 2)
            optimizer.save(tmp_path / name)
            whole = optimizer.shards.read(STATE_ARRAYS)[1]
    bad, good = (store.step_directories(tmp_path / name)[-1] for name in ("bad", "good"))
    victim = Path(str(bad)) / store.load(bad).files[0].name
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    layout = Layout.of(params())
    host = ShardHost(
        ShardSpec(
            index=0,
            num_shards=1,
            num_workers=2,
            replicas=0,
            name=None,
            config=NadamConfig(),
            options=Options(),
            layout=layout,
            ranges=layout.cuts(1)[0],
        )
    )
    with pytest.raises(CheckpointError, match=victim.name):
        host.send(Load(epoch=1, directory=str(bad), manifest=store.load(bad).to_bytes())).result()
    for message in (
        Pull(rank=0, incarnation=1, want_parameters=True),
        Push(epoch=1, rank=0, incarnation=1, round=1, gradients=None, rejection="none"),
    ):
        with pytest.raises(ShardLost, match="without a state, since loading failed"):
            host.send(message).result()
    assert (
        host.send(Load(epoch=2, directory=str(good), manifest=store.load(good).to_bytes())).result()
        == 2
    )
    assert all(
        np.array_equal(host.shard.state.arrays()[name][s], whole[name][s])
        for name in STATE_ARRAYS
        for s in layout.sizes
    )
    host.close()


def test_a_directory_falls_back_to_an_older_one_while_it_loads_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend="local").build(params()) as optimizer:
        kept = []
        for step in range(2):
            run(optimizer, step, step + 1)
            kept.append((Path(optimizer.save(tmp_path)), bits(optimizer)))
    victim = sorted(kept[1][0].glob("shard-*"))[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with DistNadam.restore(tmp_path, num_shards=3, backend="local") as optimizer:
        assert bits(optimizer) == kept[0][1]
    assert f"passed over: {victim}" in caplog.text
    with pytest.raises(CheckpointError, match=victim.name):
        DistNadam.restore(kept[1][0], backend="local")


@pytest.mark.nightly
def test_a_restore_on_ray_takes_no_more_memory_on_its_way_than_what_it_ends_with(
    tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    elements, shards = 10**7, 3
    with DistNadam(num_shards=2, backend="local").build(
        {"w": np.ones(elements, np.float32)}
    ) as optimizer:
        optimizer.save(tmp_path)
    with DistNadam.restore(tmp_path, num_shards=shards, backend="ray") as optimizer:
        backend: Any = optimizer.shards.backend
        for facts in ray.get([actor.about.remote() for actor in backend.actors]):
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{facts['pid']}/status").read_text().splitlines()
            )
            peak, held = (int(status[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
            assert peak - held < 0.1 * 12 * elements / shards
