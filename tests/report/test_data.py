"""What the page on runs is made of: records read back, thinned, with verdicts of checkpoints."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from typing_extensions import override

from distnadam.cli import main
from distnadam.errors import TrainingError
from distnadam.report.data import read_run
from distnadam.report.page import as_script
from distnadam.training.callbacks import Callback
from distnadam.training.metrics_file import COLUMNS, MetricsFile
from distnadam.training.steps import Phases, StepRecord
from tests.training.test_fit import Quadratic, train


def test_a_run_is_read_back_with_what_became_of_its_checkpoints(tmp_path: Path) -> None:
    history = train(tmp_path, 40, save_every=10, keep=2, evaluate_every=20)
    data = next(Path(history.checkpoints[-1]).glob("*.safetensors"))
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    run = read_run(tmp_path)
    assert (run["task"], run["outcome"], run["reached"], run["steps"]) == (
        "quadratic",
        "finished",
        40,
        40,
    )
    assert run["loss"]["raw"] == {"x": history.steps, "y": history.losses}
    assert run["metrics"]["distance"]["x"] == [20, 40]
    mean = Phases(*(1e3 * sum(column) / 40 for column in zip(*history.phases, strict=True)))
    assert run["time"]["mean"] == pytest.approx(mean._asdict(), abs=1e-3)
    verdicts = [(each["step"], each["verdict"]) for each in run["checkpoints"]]
    assert verdicts[:3] == [(10, "removed"), (20, "removed"), (30, "verified")]
    assert re.search(r"checksum", verdicts[3][1])
    assert read_run(tmp_path, verify=False)["checkpoints"][3]["verdict"] == "complete"
    assert {each["shard"] for each in run["hosts"]["shards"]} == {0, 1}
    assert run["configuration"]["beta_1"] == "0.9"
    json.dumps(run, allow_nan=False)


def test_a_resumed_run_says_how_it_ended_before(tmp_path: Path) -> None:
    train(tmp_path, 20, save_every=10)
    train(tmp_path, 30, save_every=10)
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    first_end = next(i for i, line in enumerate(events) if json.loads(line)["event"] == "end")
    run = read_run(tmp_path)
    assert run["resumes"] == [
        {
            "step": 20,
            "who": "the run",
            "text": "the run ended (finished), and went on from step 20",
        }
    ]
    assert run["started"] == json.loads(events[0])["time"], "when it began, not when it went on"
    del events[first_end]  # as SIGKILL leaves it
    (tmp_path / "events.jsonl").write_text("\n".join(events))
    assert read_run(tmp_path)["resumes"][0]["text"] == (
        "the run was killed, and went on from step 20"
    )


def test_long_curves_keep_their_spikes(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.on_begin(0, 30_000)
    for step in range(1, 30_001):
        loss = {777: 50.0, 20_000: math.nan}.get(step, 1.0 / step)
        phases = Phases(1e-3, 0.0, 0.0, 1e-3, 0.0)
        file.on_records([StepRecord(step=step, loss=loss, lr=0.1, ranks=(0,), phases=phases)])
    file.on_end()
    run = read_run(tmp_path)
    raw = run["loss"]["raw"]
    assert len(raw["x"]) <= 2100
    assert dict(zip(raw["x"], raw["y"], strict=True))[777] == 50.0
    assert raw["x"] == sorted(raw["x"])
    assert run["outcome"] == "running, or killed", "there is no events.jsonl"
    assert run["time"]["steps_per_s"] == pytest.approx([500.0] * len(run["time"]["x"]))
    assert len(run["time"]["x"]) <= 151


class Killed(Quadratic):
    """Its process dies in the sixth step."""

    def batch(self, step: int, rank: int, world_size: int) -> int:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, rank, world_size)


def test_of_a_run_without_an_end_its_lock_tells_whether_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Look(Callback):
        @override
        def on_step(self, step: int, loss: float) -> None:
            seen.append(read_run(tmp_path)["outcome"])

    train(tmp_path, 2, callbacks=[Look()])
    assert seen == ["running", "running"]
    code = (
        "from pathlib import Path; from tests.training.test_fit import train; "
        "from tests.report.test_data import Killed; train(Path(), 10, Killed(), num_workers=1)"
    )
    died = tmp_path / "died"
    died.mkdir()
    command = [sys.executable, "-c", code]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, cwd=died, env=where).returncode == -signal.SIGKILL
    assert read_run(died)["outcome"] == "killed"
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert re.fullmatch(r"running on \S+, or killed", read_run(died)["outcome"])


def test_an_evaluated_loss_is_not_a_steps(tmp_path: Path) -> None:
    class Evaluated(Quadratic):
        def evaluate(self, params: Any) -> dict[str, float]:
            return {"loss": 99.0}

    history = train(tmp_path, 10, Evaluated())
    run = read_run(tmp_path)
    assert run["loss"]["raw"]["y"] == history.losses
    assert run["metrics"] == {"loss": {"x": [10], "y": [99.0]}}


def test_files_of_before_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,metric,value,lr,seconds,ranks\n1,loss,0.5,0.1,0.2,0-1\n1,accuracy,0.9,,0.2,\n"
    )
    run = read_run(tmp_path)
    assert run["loss"]["raw"] == {"x": [1], "y": [0.5]}
    assert run["time"]["x"] == []
    assert len(COLUMNS) == 11


def test_text_in_a_run_ends_no_script_and_a_directory_without_a_run_is_refused(
    tmp_path: Path,
) -> None:
    assert "</script>" not in as_script({"name": "</script><script>alert(1)</script>"})
    with pytest.raises(TrainingError, match=r"holds no run: there is no metrics\.csv in it"):
        read_run(tmp_path)
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no run" in result.output
