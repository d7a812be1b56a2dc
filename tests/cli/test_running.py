"""The commands on a named optimizer, which these tests run in this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options, fit
from distnadam.checkpoint import store
from distnadam.errors import LifecycleError
from tests.cli.test_cli import call
from tests.training.test_fit import Quadratic

GRADIENTS = {"w": np.ones(5000, np.float32)}


@pytest.fixture(scope="module")
def running(ray_cluster: None, one_process: None) -> Iterator[DistNadam]:
    """One optimizer for all tests, the last of which ends it."""
    made = DistNadam(name="operated", num_shards=2, num_workers=2, replicas=1, backend="ray")
    with made.build(GRADIENTS) as optimizer:
        yield optimizer


def run_json(*args: Any) -> Any:
    done = call(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_save_goes_to_a_given_path_or_where_checkpoints_went(
    running: DistNadam, tmp_path: Path
) -> None:
    running.apply_gradients(GRADIENTS)
    assert run_json("status", "operated")["checkpoint"] is None
    refused = call("save", "operated")
    assert (
        refused.exit_code,
        "was never saved and has no checkpoint_dir: give a PATH" in refused.stderr,
    ) == (1, True)
    assert run_json("save", "operated", tmp_path) == {"checkpoint": str(tmp_path / "step_00000001")}
    running.apply_gradients(GRADIENTS)
    assert call("save", "operated").stdout.strip() == str(tmp_path / "step_00000002")
    assert call("verify", tmp_path).exit_code == 0


@pytest.mark.slow
def test_reshard_moves_a_running_optimizer_to_more_shards(running: DistNadam) -> None:
    running.apply_gradients(GRADIENTS)
    before = running.get_weights()
    assert call("reshard", "operated", 3).stdout == "operated: 3 shard(s)\n"
    assert len(run_json("status", "operated")["shards"]) == 3
    assert all(np.array_equal(a, b) for a, b in zip(before, running.get_weights(), strict=True))
    assert call("reshard", "operated", 0).exit_code == 2
    assert call("reshard", "operated").exit_code == 2
    assert call("reshard", "operated", 3, "--balance").exit_code == 2
    assert call("reshard", "operated", 3, "--dry-run").exit_code == 2
    idle = call("reshard", "operated", "--balance", "--over", 0.1)
    assert idle.exit_code == 1 and "not every shard decided a round" in idle.stderr
    assert call("reshard", "operated", 2).exit_code == 0


def test_status_shows_steps_shards_workers_standbys_and_the_last_checkpoint(
    running: DistNadam, tmp_path: Path
) -> None:
    step = running.apply_gradients(GRADIENTS)
    seen = run_json("status", "operated")
    assert (seen["name"], seen["step"], seen["round"]) == ("operated", step, step)
    assert seen["lr"] == 0.002
    assert [w["state"] for w in seen["workers"]] == ["not there yet"] * 2
    saved = running.save(tmp_path)
    with running.worker(0) as worker:
        worker.push(GRADIENTS)
        while (seen := run_json("status", "operated"))["shards"][1]["lag"] is None:
            pass  # until the standbys are filled; the test's own timeout bounds it
    assert [(s["index"], s["state"], s["round"], s["lag"]) for s in seen["shards"]] == [
        (0, "collecting pushes", step, 0),
        (1, "collecting pushes", step, 0),
    ]
    assert sum(s["bytes"] for s in seen["shards"]) == 16 * 5000
    assert all("." in s["node"] for s in seen["shards"])
    assert [s["standby"] for s in seen["shards"]] == [s["node"] for s in seen["shards"]], (
        "here, on the one node that there is"
    )
    assert seen["checkpoint"] == saved
    assert [w["state"] for w in seen["workers"]] == ["waiting for others", "not there yet"]
    assert seen["steps_per_s"] == 0
    assert seen["awaited"].startswith("the push of rank 1 to shards 0, 1, which computed last ")
    assert [s["waits_for"] for s in seen["shards"]] == [[1], [1]]
    assert seen["hosts"] == [], "all on one"
    assert seen["transport"].startswith(
        "shared memory within a node, TCP at any port between nodes"
    )
    table = call("status", "operated").stdout
    for word in (
        f"operated: step {step}",
        "0.0 steps/s",
        "lr 0.002",
        "optimizer: nadam",
        "standbys",
        "0 rounds",
        "the next step waits for the push of rank",
        "closed",
        f"step_{step:08}",
    ):
        assert word in table


def test_a_wrong_name_is_one_sentence_that_says_which_are_there(running: DistNadam) -> None:
    for command in (
        ["status", "nobody"],
        ["save", "nobody"],
        ["reshard", "nobody", 2],
        ["stop", "nobody"],
    ):
        done = call(*command)
        assert done.exit_code == 1
        assert done.stderr == (
            "distnadam: no optimizer named 'nobody' is running on this Ray cluster; those "
            "that are: operated\n"
        )


def test_stop_ends_it_for_all_who_use_it(running: DistNadam) -> None:
    with running.worker(0) as worker, running.worker(1) as other:
        other.push(GRADIENTS)
        worker.step(GRADIENTS)
        # in this process, which built the optimizer, Ray prints the deaths first
        assert call("stop", "operated").stdout.endswith("operated: ended\n")
        with pytest.raises(
            LifecycleError, match=r"'operated' was ended by another process: by `distnadam stop`"
        ):
            worker.step(GRADIENTS)
    with pytest.raises(LifecycleError, match="was ended"):
        running.get_params()
    again = call("stop", "operated")
    assert (again.exit_code, again.stderr) == (
        1,
        "distnadam: no optimizer named 'operated' is running on this Ray cluster\n",
    )


@pytest.mark.nightly
def test_a_run_goes_on_from_what_was_saved_by_hand_beside_its_own_checkpoints(
    ray_cluster: None, tmp_path: Path
) -> None:
    fit(Quadratic(), steps=5, backend="ray", checkpoint_dir=tmp_path, verbose=False)
    with DistNadam.restore(tmp_path, name="by-hand", backend="ray") as optimizer:
        optimizer.apply_gradients(optimizer.get_params())
        assert call("save", "by-hand").exit_code == 0
        assert call("save", "by-hand", tmp_path / "elsewhere").exit_code == 0
        with DistNadam.connect("by-hand") as connected:
            connected.save(tmp_path / "by handle")
    for place in (tmp_path, tmp_path / "elsewhere", tmp_path / "by handle"):
        saved = place / "step_00000006"
        assert store.load(saved).run == store.load(tmp_path / "step_00000005").run
        history = fit(Quadratic(), steps=7, backend="local", checkpoint_dir=place, verbose=False)
        assert history.resumed_from == saved


def test_a_named_optimizer_of_other_options_saves_where_those_say(
    ray_cluster: None, tmp_path: Path
) -> None:
    options = Options(checkpoint_dir=str(tmp_path))
    with DistNadam(name="placed", backend="ray", options=options).build(GRADIENTS) as optimizer:
        optimizer.apply_gradients(GRADIENTS)
        assert run_json("save", "placed")["checkpoint"] == str(tmp_path / "step_00000001")
