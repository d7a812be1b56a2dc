"""SIGTERM saves as Ctrl-C does, within a grace, and is the exit status."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from distnadam import DistNadam, fit
from distnadam.errors import ConfigError
from distnadam.training.callbacks import Callback
from distnadam.training.termination import STATUS, Termination


class Square:
    """Minimises a square."""

    def init(self, seed: int) -> Any:
        return {"w": np.full(4, 5, np.float32)}

    def batch(self, step: int, rank: int, world_size: int) -> int:
        return step

    def loss_and_gradients(self, params: Any, batch: int) -> Any:
        return float((params["w"] ** 2).sum()), {"w": 2 * params["w"]}

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"size": float(np.abs(params["w"]).sum())}


class Terminate(Callback):
    """Sends this process SIGTERM at one event, once."""

    def __init__(self, event: str) -> None:
        self._event = event
        self.sent = 0

    def _send(self, event: str) -> None:
        if event == self._event and not self.sent:
            self.sent += 1
            signal.raise_signal(signal.SIGTERM)

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self._send("begin")

    @override
    def on_step(self, step: int, loss: float) -> None:
        self._send("step")

    @override
    def on_evaluate(self, step: int, metrics: Any) -> None:
        self._send("evaluate")

    @override
    def on_save(self, step: int, path: Any) -> None:
        self._send("save")


def train(path: Path, *callbacks: Callback, steps: int = 40) -> Any:
    return fit(
        Square(),
        steps=steps,
        backend="local",
        checkpoint_dir=path,
        save_every=3,
        evaluate_every=3,
        callbacks=callbacks,
        verbose=False,
    )


@pytest.mark.parametrize("event", ["begin", "step", "evaluate", "save"])
def test_a_run_saves_where_sigterm_finds_it_and_goes_on_to_the_same_bits(
    tmp_path: Path, event: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "stopped", Terminate(event))
    assert ended.value.code == STATUS == 143
    assert signal.getsignal(signal.SIGTERM) == before
    again = train(tmp_path / "stopped")
    assert again.resumed_from is not None
    train(tmp_path / "whole")
    found = []
    for name in ("stopped", "whole"):
        with DistNadam.restore(tmp_path / name, backend="local") as restored:
            found.append([weight.tobytes() for weight in restored.get_weights()])
    assert found[0] == found[1]


def test_sigterm_after_the_last_step_is_still_the_status(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, Terminate("step"), steps=1)
    with DistNadam.restore(tmp_path, backend="local") as restored:
        assert restored.iterations == 1


def test_a_handler_of_the_program_is_left_alone(tmp_path: Path) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        history = train(tmp_path, Terminate("step"), steps=5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (got, history.steps[-1]) == ([signal.SIGTERM], 5)


def test_another_thread_than_the_main_one_takes_no_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def look() -> None:
        with Termination(1.0):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_step_that_outlasts_the_grace_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        "import threading\nimport numpy as np\n"
        "class Stuck:\n"
        "    def init(self, seed): return {'w': np.ones(2, np.float32)}\n"
        "    def batch(self, step, rank, world_size):\n"
        "        print('stepping', flush=True)\n"
        "        threading.Event().wait()\n"
        "    def loss_and_gradients(self, params, batch): return 0.0, params\n"
        "    def evaluate(self, params): return {}\n"
    )
    args = ["train", "stuck.py:Stuck", "--local", "--workers", "1", "--stop-grace", "0.2"]
    with subprocess.Popen(
        [sys.executable, "-m", "distnadam", *args, "--checkpoint-dir", "run", "--quiet"],
        cwd=tmp_path,
        env=os.environ,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # the command's standard output is for its summary
            if "stepping" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == STATUS
    assert "SIGTERM: not saved within 0.2 s" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("grace", [0, -1.0, float("nan"), float("inf")])
def test_a_grace_that_is_no_time_is_refused(tmp_path: Path, grace: float) -> None:
    with pytest.raises(ConfigError, match="stop_grace_s"):
        fit(Square(), steps=1, backend="local", checkpoint_dir=tmp_path, stop_grace_s=grace)
