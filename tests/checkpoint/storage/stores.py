"""The test that every object store must pass."""

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.checkpoint.storage.resolve import open_directory
from tests.models import bits, params, run


def saves_prunes_and_restores(bucket: str) -> None:
    """Save in the background and twice at one step, prune, and restore onto other shards."""
    with DistNadam(num_shards=3, num_workers=2, backend="local").build(params()) as optimizer:
        for step in range(3):
            run(optimizer, step, step + 1)
            optimizer.save(bucket, wait=False)
        again = optimizer.save(bucket)
        expected = bits(optimizer)
    assert [step.name for step in store.prune(bucket, 2, again)] == ["step_00000001"]
    assert len(open_directory(again).files()) == 4
    with DistNadam.restore(bucket, num_shards=2, backend="local") as optimizer:
        assert bits(optimizer) == expected
