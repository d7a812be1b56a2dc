"""Ranks agree on what they change between two steps, in a round of its own; or it is refused."""

from threading import Thread
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.client.agreement import Agreement
from distnadam.errors import RanksDisagree

ONES = {"w": np.ones(3, np.float32)}


def together(*works: Any) -> list[str]:
    """What each work, in a thread of its own, raised; "" for nothing."""
    raised = [""] * len(works)

    def run(index: int) -> None:
        try:
            works[index]()
        except RanksDisagree as error:
            raised[index] = str(error)

    threads = [Thread(target=run, args=[index]) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    return raised


@pytest.mark.on_ray
def test_ranks_that_say_the_same_go_on_without_a_step_and_others_are_refused(backend: str) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(ONES) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        assert together(*[lambda w=w: w.step(ONES) for w in workers]) == ["", ""]
        before = optimizer.get_params()["w"].tobytes()
        kept = Agreement(), Agreement()

        def reach(rank: int, what: str) -> None:
            kept[rank].reach(workers[rank].session, what)

        agreed = [lambda rank=rank: reach(rank, "'w' (12ab)") for rank in range(2)]
        assert together(*agreed) == ["", ""]
        assert together(*reversed(agreed)) == ["", ""]  # which is no round of its own
        for each in kept:
            each.carried_out()
        assert (optimizer.round, optimizer.iterations) == (2, 1)
        for work in (
            lambda: reach(1, "'w' (34cd)"),
            lambda: workers[1].step(ONES),
            lambda: workers[1].step(found_inf=True),
        ):
            said = together(agreed[0], work)
            assert said[0] == said[1] and "rank 0 changed 'w' (12ab), rank 1 changed " in said[0]
        assert optimizer.get_params()["w"].tobytes() == before
        assert together(*[lambda w=w: w.step(ONES) for w in workers]) == ["", ""]
        assert optimizer.iterations == 2
