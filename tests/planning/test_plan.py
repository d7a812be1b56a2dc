"""A plan's bytes and times follow from its topology; its constants are read, or refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from distnadam.cli import main
from distnadam.errors import ConfigError
from distnadam.planning import traffic
from distnadam.planning.advice import best
from distnadam.planning.constants import TYPICAL, Constants
from distnadam.planning.peers import ring_all_reduce_s, single_server_s
from distnadam.planning.planned_run import PlannedRun
from distnadam.planning.simulation import Surroundings, simulate
from distnadam.planning.step_time import step_time

TOPOLOGIES = st.builds(
    PlannedRun,
    parameters=st.integers(1, 10**10),
    hosts=st.integers(1, 200),
    workers_per_host=st.integers(1, 8),
    shards=st.none() | st.integers(1, 400),
    shard_hosts=st.integers(0, 50),
    replicas=st.integers(0, 1),
    half_gradients=st.booleans(),
    half_parameters=st.booleans(),
)


@given(TOPOLOGIES)
def test_what_one_host_moves_is_no_more_than_what_all_move(run: PlannedRun) -> None:
    for moved in (traffic.gradients(run), traffic.parameters(run), traffic.replication(run)):
        assert 0 <= moved.sent <= moved.in_all * (1 + 1e-9)
        assert 0 <= moved.received <= moved.in_all * (1 + 1e-9)


@given(TOPOLOGIES)
def test_a_step_is_the_sum_of_its_phases_and_none_is_negative(run: PlannedRun) -> None:
    found = step_time(run, TYPICAL)
    assert all(phase.seconds >= 0 for phase in found.phases)
    assert found.seconds == sum(phase.seconds for phase in found.phases)
    assert found.longest in found.phases


@given(TOPOLOGIES)
def test_more_parameters_and_a_slower_cable_take_no_less_time(run: PlannedRun) -> None:
    now = step_time(run, TYPICAL).seconds
    more = dataclasses.replace(run, parameters=2 * run.parameters)
    slower = dataclasses.replace(TYPICAL, link_bytes_per_s=TYPICAL.link_bytes_per_s / 10)
    assert step_time(more, TYPICAL).seconds >= now
    assert step_time(run, slower).seconds >= now
    assert step_time(run, TYPICAL, views=True).seconds <= now


@given(TOPOLOGIES)
def test_what_is_advised_is_no_slower_than_what_was_asked(run: PlannedRun) -> None:
    chosen, found = best(run, TYPICAL)
    assert found.seconds <= step_time(run, TYPICAL).seconds
    assert chosen.workers == run.workers


def test_the_least_bytes_of_three_hosts_are_those_of_an_all_reduce() -> None:
    run = PlannedRun(parameters=10**7, hosts=3)
    moved = traffic.gradients(run).most + traffic.parameters(run).most
    assert moved == pytest.approx(2 * 2 / 3 * 4 * 10**7)
    alone = dataclasses.replace(run, workers_per_host=2)
    summed = dataclasses.replace(alone, sum_group=2)
    assert traffic.gradients(alone).most == 2 * traffic.gradients(summed).most
    assert traffic.gradients(dataclasses.replace(run, half_gradients=True)).most == pytest.approx(
        traffic.gradients(run).most / 2
    )


def test_one_host_moves_nothing_by_cable_and_one_server_moves_most() -> None:
    assert traffic.gradients(PlannedRun(parameters=10**6)).in_all == 0
    run = PlannedRun(parameters=10**8, hosts=16)
    ours = step_time(run, TYPICAL).seconds
    assert ring_all_reduce_s(run, TYPICAL) < single_server_s(run, TYPICAL)
    assert ours < single_server_s(run, TYPICAL)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"parameters": 0}, "parameters: expected at least 1, got 0"),
        ({"hosts": 0}, "hosts: expected at least 1, got 0"),
        ({"shards": 0}, "shards: expected at least 1, got 0"),
        ({"replicas": 2}, "replicas: expected 0 or 1, got 2"),
        ({"workers_per_host": 3, "sum_group": 2}, "2 does not divide the 3 workers of a host"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PlannedRun(**{"parameters": 10, **wrong})


def test_constants_come_back_from_their_file(tmp_path: Path) -> None:
    path = str(tmp_path / "constants.json")
    TYPICAL.save(path)
    assert Constants.load(path) == TYPICAL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as constants"),
        ("[" * 100_000, "cannot be read as constants"),
        ("[]", "expected the names .* got list"),
        ('{"cores": 2}', "expected the names .* got \\['cores'\\]"),
        (None, "cannot be read as constants"),
        ("nan", "turn_s: expected a number above 0, got nan"),
        ('"fast"', "turn_s: expected a number above 0, got 'fast'"),
        ("0", "turn_s: expected a number above 0, got 0"),
        ("true", "turn_s: expected a number above 0, got True"),
    ],
)
def test_constants_that_are_none_are_refused_by_file_and_name(
    text: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "constants.json"
    if text is not None and not text.startswith(("{", "[")):
        numbers = {**dataclasses.asdict(TYPICAL), "turn_s": 0}
        written = json.dumps(numbers).replace('"turn_s": 0', f'"turn_s": {text}')
        path.write_text(written.replace("nan", "NaN"))
    elif text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        Constants.load(str(path))
    assert str(path) in str(refused.value)


def test_a_simulation_can_be_repeated_and_losses_cost_time() -> None:
    run = PlannedRun(parameters=10**8, hosts=20, workers_per_host=5, sum_group=5)
    calm = Surroundings()
    assert simulate(run, TYPICAL, calm) == simulate(run, TYPICAL, calm)
    assert simulate(run, TYPICAL, calm) != simulate(run, TYPICAL, calm, seed=1)
    lossy = dataclasses.replace(calm, host_lost_every_s=3600.0)
    racks = dataclasses.replace(calm, rack_hosts=4, rack_link_bytes_per_s=1e8)
    for before, after, crowded in zip(
        *(simulate(run, TYPICAL, each) for each in (calm, lossy, racks)), strict=True
    ):
        assert after.round_s > before.round_s
        assert crowded.round_s >= before.round_s


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--parameters 1e8 --hosts 8 --workers-per-host 2 --link 10Gbit", "16 worker(s) on 8 host"),
        ("--parameters 1e4", "longest is turn, bound by delay"),
        ("--parameters 1e8 --hosts 2 --link 1Gbit/s", "bound by cable"),
        ("--parameters 1e8 --hosts 2 --workers-per-host 4 --link 1Gbit/s", "sum_group=4"),
        ("--parameters 1e8 --hosts 2 --sum-group 1 --shards 7", "7 shard"),
    ],
)
def test_plan_says_what_bounds_a_step(asked: str, said: str) -> None:
    done = CliRunner().invoke(main, ["plan", *asked.split()])
    assert done.exit_code == 0, done.output
    assert said in done.output
    assert ("MB of a step" in done.output) == ("--hosts" in asked), "one host sends to nobody"


def test_plan_prints_one_record_and_takes_constants_from_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "constants.json")
    dataclasses.replace(TYPICAL, turn_s=0.5).save(path)
    asked = ["plan", "--parameters", "1e6", "--constants", path, "--json"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["phases"]["turn"]["seconds"] == 0.5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--parameters much", "expected a whole number of at least 1, such as 1e9, got 'much'"),
        ("--parameters -1e9", "such as 1e9, got '-1e9'"),
        ("--parameters 0.5", "such as 1e9, got '0.5'"),
        ("--parameters inf", "such as 1e9, got 'inf'"),
        ("--parameters 1e9 --shards 0", "such as 1e9, got '0'"),
        ("--parameters 1e9 --replicas 2", "2 is not in the range 0<=x<=1"),
        (
            "--parameters 1e9 --link fast",
            "a speed such as 10Gbit/s or 1.2GB/s, got 'fast'",
        ),
        ("--parameters 1e9 --link 0Gbit", "expected a speed"),
        ("--hosts 2", "Missing option '--parameters'"),
        ("--parameters 1e9 --constants /nowhere", "/nowhere: cannot be read as constants"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_so_many_words(asked: str, message: str) -> None:
    done = CliRunner().invoke(main, ["plan", *asked.split()])
    assert done.exit_code in (1, 2)
    assert message in done.output
