"""Arenas: shared, nameless, of a checked size, and a lack of memory is an error."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distnadam.errors import ArenaError
from distnadam.transport.available_memory import available_bytes
from distnadam.transport.shared_memory import Arena

SIZES = {"float32": 5000, "float64": 3}


def test_what_one_mapping_writes_the_other_reads_and_cannot_write() -> None:
    mine = Arena.create(SIZES, copies=2)
    other = Arena.attach(os.dup(mine.fd), SIZES, copies=2)
    for number, flat in enumerate(mine.flats):
        for values in flat.values():
            assert not values.any()
            values[:] = number + 1
    assert [float(flat[space].sum()) for flat in other.flats for space in SIZES] == [
        5000.0,
        3.0,
        10000.0,
        6.0,
    ]
    with pytest.raises(ValueError, match="read-only"):
        other.flats[0]["float32"][0] = 1


def test_a_space_may_be_read_in_half_precision_from_its_beginning() -> None:
    arena = Arena.create(SIZES)
    half = arena.flat(dtypes={"float32": np.dtype(np.float16)})
    half["float32"][:] = 1.5
    assert half["float32"].size == 5000
    assert arena.flats[0]["float32"].view(np.float16)[:5000].tolist() == [1.5] * 5000
    assert not arena.flats[0]["float64"].any()


def test_views_stay_good_when_the_arena_object_is_gone() -> None:
    view = Arena.create(SIZES).flats[0]["float32"]
    view[:] = 7
    assert view.sum() == 35000


@pytest.mark.parametrize("sizes", [{"float32": 5000}, {"float32": 5000, "float64": 9999}])
def test_memory_of_another_size_is_refused(sizes: dict[str, int]) -> None:
    mine = Arena.create(SIZES)
    with pytest.raises(ArenaError, match=r"expected \d+ bytes of sealed shared memory, got"):
        Arena.attach(os.dup(mine.fd), sizes)


def test_memory_that_its_holder_could_shrink_is_refused() -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    with pytest.raises(ArenaError, match="sealed"):
        Arena.attach(fd, {"float32": 10})


def test_nobody_can_shrink_it() -> None:
    arena = Arena.create(SIZES)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)


def test_more_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ArenaError, match=r"MiB of shared memory, \d+ MiB are available"):
        Arena.create({"float64": available_bytes() // 4})


def test_a_limit_of_the_system_is_an_error_and_no_signal() -> None:
    code = (
        "import resource, sys; sys.dont_write_bytecode = True\n"
        "from distnadam.errors import ArenaError\n"
        "from distnadam.transport.shared_memory import Arena\n"
    )
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    code += "try: Arena.create({'float32': 10**6})\nexcept ArenaError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "4 MiB of shared memory are not available" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def mapped_files() -> set[tuple[str, str]]:
    """What this process has mapped into its memory: addresses, and files as /proc names them."""
    rows = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return {(row[0], row[5].strip()) for row in rows if len(row) > 5}


def test_nothing_of_it_is_in_the_file_system() -> None:
    before = mapped_files()
    arena = Arena.create({"float32": 10**6})
    new = mapped_files() - before
    assert new
    assert all(re.fullmatch(r"/memfd:.* \(deleted\)", name) for _, name in new), new
    assert arena.flats
