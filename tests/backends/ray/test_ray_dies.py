"""Ray itself dies, its raylet on this host or its head: every call is refused in one sentence, at
once, and no other Ray is started.
"""

from pathlib import Path

import pytest

from tests.backends.ray.test_without_ray import JOINED, SCRIPT, run

pytestmark = pytest.mark.timeout(240)

DIED = """
from pathlib import Path

def kill(name):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            program = (process / "cmdline").read_bytes().split(b"\\0")[0].decode()
        except OSError:
            continue
        if parent == os.getpid() and program.endswith("/" + name):
            os.kill(int(process.name), signal.SIGKILL)
            os.waitid(os.P_PID, int(process.name), os.WEXITED | os.WNOWAIT)
            return
    raise AssertionError(f"there is no {name}")

kill("{victim}")
refused("Ray itself died: its {told}", RayLost)
for call in (lambda: DistNadam(backend="ray").build(params), lambda: DistNadam.connect("x")):
    try:
        call()
    except RayLost as error:
        assert "Ray itself died" in str(error), error
    else:
        raise AssertionError("not refused")
optimizer.close()
assert ray.is_initialized() == "{start}"
os._exit(0)  # without a word of Ray's at exit
"""


def died(victim: str, told: str, *, start: str = "") -> str:
    script = SCRIPT + DIED.replace("{victim}", victim).replace("{told}", told)
    return script.replace('"{start}"', str(start != "")).replace("{start}", start)


def test_without_its_raylet_every_call_is_refused(tmp_path: Path) -> None:
    run(died("raylet", "raylet on this host"), tmp_path)


@pytest.mark.nightly
def test_without_its_head_every_call_is_refused(tmp_path: Path) -> None:
    run(died("gcs_server", "head at"), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("victim", "told"),
    [
        ("raylet", "raylet on this host"),
        pytest.param("gcs_server", "head at", marks=pytest.mark.nightly),
    ],
)
def test_a_ray_that_was_there_before_is_given_up_before_ray_ends_the_process(
    tmp_path: Path, victim: str, told: str
) -> None:
    script = died(victim, told, start=JOINED)
    run(script, tmp_path, RAY_gcs_rpc_server_reconnect_timeout_s="20")


FIT = """
import os, signal
import numpy as np
from distnadam import fit
from distnadam.errors import RayLost
from distnadam.training.callbacks import Callback

class Square:
    def init(self, seed):
        return {"w": np.ones(5, np.float32)}
    def batch(self, step, rank, world_size):
        return np.float32(step + rank)
    def loss_and_gradients(self, params, batch):
        return float((params["w"] ** 2).sum()), {"w": 2 * params["w"] + batch / 100}
    def evaluate(self, params):
        return {}

class Killer(Callback):
    def on_save(self, step, path):
        kill("{victim}")

{kill}
how = {"steps": 400, "save_every": 20, "verbose": False}
try:
    fit(Square(), backend="ray", checkpoint_dir="run", callbacks=[Killer()], **how)
except RayLost as error:
    assert error.step >= 20 and error.checkpoint_dir == os.path.abspath("run"), vars(error)
    for word in ("Ray itself died", f"; step {error.step} is saved in", "call fit again"):
        assert word in str(error), error
    saved = error.step
else:
    raise AssertionError("it lived")
resumed = fit(Square(), backend="ray", checkpoint_dir="run", **how)
assert resumed.resumed_from == Path("run", f"step_{saved:08}").absolute(), resumed.resumed_from
whole = fit(Square(), backend="local", checkpoint_dir="whole", **how)
ends = [
    [path.read_bytes() for path in sorted(history.checkpoints[-1].glob("shard-*"))]
    for history in (resumed, whole)
]
assert ends[0] == ends[1] and len(ends[0]) == 2
"""


@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_fit_says_what_is_saved_and_goes_on_from_there_when_called_again(
    tmp_path: Path, victim: str
) -> None:
    kill = DIED[DIED.index("from pathlib") : DIED.index('kill("{victim}")')]
    run(FIT.replace("{kill}", kill).replace("{victim}", victim), tmp_path)
