"""What counts as flat."""

import pytest

from tests.hosts.usage import GROWTH_BYTES, GROWTH_DESCRIPTORS, Life, flat_or_not, role_of


@pytest.mark.parametrize(
    ("sizes", "descriptors", "flat"),
    [
        ([50] * 100, [60] * 100, True),
        ([50] * 10 + [90] * 90, [60] * 100, True),  # what it takes while it warms up
        ([50] * 50 + [900] + [50] * 49, [60] * 100, True),  # a moment's
        ([50 + second for second in range(100)], [60] * 100, False),
        ([50] * 100, [60 + second for second in range(100)], False),
        ([50] * 100, [60] * 30 + [60 + GROWTH_DESCRIPTORS + 1] * 70, False),
        ([50 + second for second in range(20)], [60] * 20, True),  # not old enough to say
    ],
)
def test_a_process_that_keeps_growing_is_not_flat(
    sizes: list[int], descriptors: list[int], flat: bool
) -> None:
    each = enumerate(zip(sizes, descriptors, strict=True))
    samples = [(float(second), size * 2**20, number) for second, (size, number) in each]
    found = flat_or_not([Life("Shard", 7, samples)], warm_up_s=20, window_s=10)
    assert bool(found) != flat, found
    assert GROWTH_BYTES < 50 * 2**20
    assert all("NOT FLAT: shard, process 7" in sentence for sentence in found)


def test_roles_are_read_from_command_lines() -> None:
    assert role_of("ray::distnadam soak Shard 1") == "Shard"
    assert role_of("ray::distnadam Worker 0") == "Worker"
    assert role_of("python -m tests.hosts.train {}") == "Driver"
    assert role_of("nsenter -t 7 -n -- python -m tests.hosts.train {}") is None
    assert role_of("ray::IDLE") is None
    assert role_of("") is None
