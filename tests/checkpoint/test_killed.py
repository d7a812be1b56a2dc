"""A save killed at any system call leaves a valid checkpoint, and nothing that looks whole."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.errors import CheckpointError
from tests.models import bits, params

CALLS = ("open", "write", "fsync", "replace", "unlink", "rmdir", "makedirs", "close")


def die_at(call: int) -> None:
    """Kill this process just before system call number `call` of those that write checkpoints."""
    left = [call]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def doing(*args: Any, **how: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if real.__name__ == "write" and left[0] == 0:  # and the call before it was cut short
                return real(args[0], args[1][: len(args[1]) // 2 or 1])
            return real(*args, **how)

        return doing

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def survives(child: Callable[[], None], call: int) -> bool:
    """Run `work` in a process that is killed at that call; return whether it ended before."""
    pid = os.fork()
    if pid == 0:
        try:
            die_at(call)
            child()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("the next step", marks=pytest.mark.slow),
        "the same step again",
        pytest.param("behind the training", marks=pytest.mark.slow),
        "removing an old one",
    ],
)
def test_a_save_killed_at_any_call_leaves_a_valid_checkpoint_and_no_part_looks_whole(
    case: str, tmp_path: Path
) -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        before = bits(optimizer)
        optimizer.save(tmp_path)
        if case == "the same step again":
            optimizer.set_params(params(1))  # as if gone back to and trained on differently
        else:
            optimizer.apply_gradients(params())
        after = bits(optimizer)

        def save() -> None:
            path = optimizer.save(tmp_path, wait=case != "behind the training")
            if not isinstance(path, str):
                path = path.result()
            if case == "removing an old one":
                store.prune(tmp_path, 1, path)

        call, outcomes = 0, set()
        while not survives(save, call):
            call += 1
            assert call < 500
            outcomes.add(check(tmp_path, before, after, same=case == "the same step again"))
            reset(tmp_path, optimizer, params() if case == "the same step again" else None)
        assert outcomes == {"before", "after"}
        assert check(tmp_path, before, after, same=case == "the same step again") == "after"


def reset(root: Path, optimizer: DistNadam, first: Any) -> None:
    """Remove all checkpoints but the first; what killed saves left behind stays."""
    newest = root / "step_00000001"
    if (newest / store.MANIFEST).exists():
        store.remove(newest)
    if first is not None or not (root / "step_00000000" / store.MANIFEST).exists():
        with DistNadam(num_shards=2, backend="local").build(params()) as other:
            other.save(root)


def check(root: Path, before: list[bytes], after: list[bytes], *, same: bool) -> str:
    """Return which of the two states the directory means; each one with a manifest is valid."""
    for step in store.step_directories(root):
        if (Path(str(step)) / store.MANIFEST).exists():
            store.verify(step)
        else:
            with pytest.raises(CheckpointError, match="manifest"):
                store.verify(step)
    with DistNadam.restore(root, backend="local") as optimizer:
        got = bits(optimizer)
    assert got in (before, after)
    return "before" if got == before else "after"
