"""An optimizer's whole life while Ray lets calls fail, before or after they ran: of its driver, its
supervisor, its shards.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray

from distnadam import DistNadam
from distnadam.errors import Rewound
from tests.models import bits

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

RULE = json.dumps(
    {
        "CoreWorkerService.grpc_client.PushTask": {
            "num_failures": 10,  # in each process
            "req_failure_prob": 20,
            "resp_failure_prob": 20,
            "in_flight_failure_prob": 0,
        }
    }
)
START = {"w": np.linspace(-1, 1, 5000, dtype=np.float32)}


def gradient(number: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(number).standard_normal(5000).astype(np.float32)}


def digest(optimizer: DistNadam) -> str:
    return hashlib.sha256(b"".join(bits(optimizer))).hexdigest()


def live(address: str, replicas: str, name: str, root: str) -> None:
    """Build, step, reshard, step, save and close."""
    ray.init(
        address=address,
        log_to_driver=False,
        runtime_env={"env_vars": {"RAY_testing_rpc_failure": RULE}},
    )
    with DistNadam(num_shards=2, replicas=int(replicas), name=name, backend="ray").build(
        START
    ) as optimizer:
        while (number := optimizer.round) < 10:
            if number == 5:
                optimizer.reshard(3)
            with suppress(Rewound):  # a shard that is silent for too long counts as dead
                optimizer.apply_gradients(gradient(number))
        optimizer.save(root)
        (Path(root) / "digest").write_text(digest(optimizer))


@pytest.mark.parametrize(
    ("replicas", "name"), [pytest.param(0, "", marks=pytest.mark.nightly), (1, "lost-calls")]
)
def test_calls_lost_on_any_way_change_no_bit_and_leave_nothing_undone(
    replicas: int, name: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.backends.ray.test_lost_calls"]
    arguments = [ray.get_runtime_context().gcs_address, str(replicas), name, str(tmp_path)]
    env = os.environ | {"RAY_testing_rpc_failure": RULE}
    done = subprocess.run(
        [*command, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with DistNadam(backend="local").build(START) as optimizer:
        for number in range(10):
            optimizer.apply_gradients(gradient(number))
        expected = digest(optimizer)
        assert (tmp_path / "digest").read_text() == expected
    with DistNadam.restore(tmp_path, backend="local", name="") as restored:
        assert digest(restored) == expected
    assert not any(
        entry["name"].startswith("lost-calls")
        for entry in ray.util.list_named_actors(all_namespaces=True)
    )


if __name__ == "__main__":
    live(*sys.argv[1:])
