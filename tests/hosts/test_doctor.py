"""What `doctor` says of the ways between hosts: their speed, and ports that are closed."""

from pathlib import Path
from typing import Any

import pytest

from distnadam.planning.constants import Constants
from tests.hosts.cluster import ONE_EACH, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ONE_EACH
BITS_PER_S = 2e8
PORT = 7411


def doctor(hosts: Cluster, *args: str) -> Any:
    program = hosts.python(hosts.hosts[0], "-m", "distnadam", "doctor", "--json", *args)
    found = program.first("links", also="problems")
    program.close()
    return found


def test_doctor_measures_the_way_to_a_host_and_names_ports_that_are_closed(
    hosts: Cluster, tmp_path: Path
) -> None:
    first, second, third = hosts.hosts
    for host in hosts.hosts:
        host.shape(BITS_PER_S)
    try:
        saved = str(tmp_path / "constants.json")
        found = doctor(hosts, "--measure", "--save", saved, second.address)
    finally:
        for host in hosts.hosts:
            host.unshape()
    assert found["problems"] == []
    assert len(found["links"]["ways"]) == 9
    carriers = {way["carrier"] for way in found["links"]["ways"]}
    assert carriers == {"shared memory", "TCP"}
    (measured,) = found["links"]["measured"]
    assert measured["host"].startswith(f"{second.address} (")
    for direction in ("sent", "received"):
        bits_per_s = 8 * measured["link"][f"{direction}_bytes_per_s"]
        assert 0.5 * BITS_PER_S < bits_per_s < 1.5 * BITS_PER_S
    assert measured["link"]["round_trip_s"] < 0.1
    constants = Constants.load(saved)  # of all hosts at once, over their cables
    assert 0.1 * BITS_PER_S < 8 * constants.link_bytes_per_s < 1.5 * BITS_PER_S
    assert constants.turn_s < 1.0
    assert measured["way"]["carrier"] == "TCP"
    third.close_port(PORT)
    try:
        found = doctor(hosts, "--measure", third.address, "--port-range", str(PORT), str(PORT))
    finally:
        third.open_port()
    (problem,) = found["problems"]
    assert f"cannot reach {third.address} (" in problem
    assert f"at port {PORT}" in problem
    assert "Ray objects are used instead" in problem
    by = {
        (way["sender"].split()[0], way["receiver"].split()[0]): way["carrier"]
        for way in found["links"]["ways"]
    }
    for host in (first, second):
        assert by[host.address, third.address] == "Ray objects"
        assert by[third.address, host.address] == "TCP"
    assert found["links"]["measured"][0]["link"] is None
