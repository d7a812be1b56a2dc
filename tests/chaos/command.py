"""Processes of Ray's own, killed under `distnadam train`, which started that Ray: the run goes on
in a new one, to the bits of a run that nothing disturbed.
"""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from tests.chaos.blows import pause
from tests.processes import children

RAYS_OWN = {
    "Ray's raylet killed": "/raylet",
    "Ray's head killed": "/gcs_server",
    "Ray's environment agent killed": "ray::RuntimeEnvAgent",
    "Ray's dashboard agent killed": "ray::DashboardAgent",
}
"""The kinds, and how the first word of the process's command line ends."""
_STEPS, _SAVE_EVERY = 1000, 50
_TRAIN = ["train", "digits", "--quiet", "--steps", str(_STEPS), "--save-every", str(_SAVE_EVERY)]
_PATIENCE_S = 300.0


class Command:
    """A run of the command, in a directory of its own."""

    def __init__(self, directory: Path, *more: str) -> None:
        self.run = directory / "run"
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distnadam", *_TRAIN, *more, "--checkpoint-dir", str(self.run)],
            cwd=directory,
            # one thread, as in Ray's workers: BLAS's threads show in the bits of gradients
            env=kept
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def await_saves(self, number: int) -> None:
        """Wait until it has saved that many times since its beginning."""
        deadline = time.monotonic() + _PATIENCE_S
        last = self.run / f"step_{number * _SAVE_EVERY:08}" / "manifest.msgpack"
        while not last.exists():
            assert self._process.poll() is None, self._process.communicate()[1]
            assert time.monotonic() < deadline, f"hung: {last} is not there"
            time.sleep(0.005)

    def kill(self, title: str) -> None:
        """Kill its process of that title."""
        victims = [pid for pid in children(self._process.pid) if _title(pid).endswith(title)]
        assert victims, f"it has no process {title}"
        os.kill(victims[0], signal.SIGKILL)

    def end(self) -> tuple[dict[str, bytes], str]:
        """Wait for its end; return the files of its last checkpoint, and what it said."""
        _, said = self._process.communicate(timeout=_PATIENCE_S)
        assert self._process.returncode == 0, said
        last = self.run / f"step_{_STEPS:08}"
        # names bear the save's id, which is another in each run
        return {path.name[:20]: path.read_bytes() for path in last.glob("shard-*")}, said


def strike(kind: str, rng: np.random.Generator, directory: Path) -> str:
    """Kill a process of that kind at a random moment; return what differs at the end, "" if
    nothing does.
    """
    command = Command(directory)
    command.await_saves(int(rng.integers(1, 4)))
    pause(rng, 1.0)
    command.kill(RAYS_OWN[kind])
    ended, said = command.end()
    # an agent takes its raylet along some time later, perhaps only after the run's end
    if "agent" not in kind and "the run goes on from there in a new Ray" not in said:
        return f"{kind}: the run did not go on in a new Ray: {said}"
    return "" if ended == undisturbed() else f"DIFFERENT: {kind} under the command"


@cache
def undisturbed() -> dict[str, bytes]:
    """Return the files of the last checkpoint of a run in one process."""
    return Command(Path(mkdtemp()), "--local").end()[0]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""
