"""The commands on a training in another terminal's Ray, behind a token; strangers are refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.test_two_nodes import environment, free_port, node

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]


def distnadam(env: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distnadam", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    return done.stderr


def test_a_training_is_watched_saved_resharded_and_stopped_from_another_terminal(
    tmp_path: Path,
) -> None:
    port, env = free_port(), environment(tmp_path)
    run, address = tmp_path / "run", f"127.0.0.1:{port}"
    train = [
        "train",
        "digits",
        "--name",
        "far",
        "--steps",
        10**7,
        "--save-every",
        500,
        "--checkpoint-dir",
        run,
        "--quiet",
    ]
    with node(env, "--head", f"--port={port}", "--include-dashboard=false"):
        command = [sys.executable, "-m", "distnadam", *map(str, train)]
        with subprocess.Popen(
            command, env=env | {"RAY_ADDRESS": address}, stderr=subprocess.PIPE, text=True
        ) as training:
            while not list(run.glob("step_*/manifest.msgpack")):
                assert training.poll() is None
            watching = [
                sys.executable,
                "-m",
                "distnadam",
                "status",
                "far",
                "--address",
                address,
                "--watch",
                "--every",
                "0.5",
                "--json",
            ]
            with subprocess.Popen(watching, env=env, stdout=subprocess.PIPE, text=True) as watch:
                assert watch.stdout is not None
                looks = [json.loads(watch.stdout.readline()) for _ in range(3)]
                watch.send_signal(signal.SIGINT)
            assert watch.returncode == 130
            assert looks[0]["step"] < looks[1]["step"] < looks[2]["step"]
            assert looks[2]["steps_per_s"] > 0
            assert looks[0]["checkpoint"].startswith(str(run / "step_"))
            table = distnadam(env, "status", "far", "--address", address)
            assert "far: step " in table.stdout, table.stderr
            saved = distnadam(env, "save", "far", tmp_path / "by hand", "--address", address)
            assert saved.stdout.startswith(str(tmp_path / "by hand" / "step_")), saved.stderr
            assert distnadam(env, "verify", tmp_path / "by hand").returncode == 0
            assert (
                distnadam(env, "reshard", "far", 3, "--address", address).stdout
                == "far: 3 shard(s)\n"
            )

            assert "'nobody' is running on this Ray cluster; those that are: far" in one_sentence(
                distnadam(env, "save", "nobody", "--address", address)
            )
            wrong = {k: v for k, v in env.items() if k != "RAY_AUTH_TOKEN_PATH"} | {
                "RAY_AUTH_TOKEN": "0" * 64
            }
            assert (
                "answers but refuses: RAY_AUTH_MODE is token here; give it, and RAY_AUTH_TOKEN"
                in one_sentence(distnadam(wrong, "status", "far", "--address", address))
            )
            assert "answers but refuses: RAY_AUTH_MODE is disabled here" in one_sentence(
                distnadam(env | {"RAY_AUTH_MODE": "disabled"}, "stop", "far", "--address", address)
            )
            assert "nobody answers at RAY_ADDRESS=127.0.0.1:1 (Connection refused)" in one_sentence(
                distnadam(env, "status", "far", "--address", "127.0.0.1:1")
            )
            assert "RAY_ADDRESS is not set" in one_sentence(distnadam(env, "stop", "far"))
            assert training.poll() is None, "nobody who was refused has disturbed it"

            assert distnadam(env, "stop", "far", "--address", address).stdout == "far: ended\n"
            _, stderr = training.communicate()
            assert training.returncode == 1
            said = [line for line in stderr.splitlines() if line.startswith("distnadam: ")]
            assert "the optimizer 'far' was ended by another process" in " ".join(said[-2:]), stderr
            assert "to go on: distnadam train digits --workers 2 --shards 2" in said[-1] + said[-2]
        assert "no optimizer named 'far'" in one_sentence(
            distnadam(env, "status", "far", "--address", address)
        )
