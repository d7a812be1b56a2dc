"""Ordinary scripts, changed in two lines, train alone as with the framework's own optimizer, and
with two ranks, whichever way they are started.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.frontends.ordinary_scripts import SCRIPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),  # of packages that are not ours
]
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]

LIMITS: dict[str, Any] = {
    "cnn": lambda found: found["accuracy"] > 0.88 and found["rate"][0] < 1e-4,
    "characters": lambda found: found["losses"][-1] < 0.8 * found["losses"][0],
    "gan": lambda found: found["gap"] < 0.5,
    "keras_classifier": lambda found: (
        found["accuracy"] > 0.85 and found["kept"] == pytest.approx(found["accuracy"])
    ),
    "flax_classifier": lambda found: found["accuracy"] > 0.85,
}
"""What each must reach on what it was not trained by, with any number of ranks."""

PEERS: dict[str, Any] = {
    "cnn": (torch.optim.AdamW, torch.amp.GradScaler),
    "characters": (torch.optim.AdamW,),
    "gan": (torch.optim.Adam,),
}
"""What torch has in the place of what is ours."""


def needed(name: str) -> None:
    for script, module in (("keras_classifier", "keras"), ("flax_classifier", "flax.linen")):
        if name == script:
            pytest.importorskip(module)


COSTLY = {"keras_classifier": pytest.mark.nightly}  # test_keras.py has the same callbacks on torch


@pytest.mark.parametrize("name", [pytest.param(n, marks=COSTLY.get(n, ())) for n in SCRIPTS])
def test_a_script_of_one_process_trains_as_with_the_framework_s_own_optimizer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed(name)
    monkeypatch.setenv("SCRIPT_DIRECTORY", str(tmp_path))
    found = SCRIPTS[name]()
    assert LIMITS[name](found), found
    if name in PEERS:
        expected = SCRIPTS[name](*PEERS[name])
        for key in {"accuracy", "gap", "losses", "rate"} & found.keys():
            assert found[key] == pytest.approx(expected[key], abs=0.03), key


def have_all_trained(directory: Path, names: list[str]) -> None:
    one, other = (json.loads((directory / f"{rank}.json").read_text()) for rank in range(2))
    assert list(one) == list(other) == names
    for name in names:
        assert one[name]["alike"] == other[name]["alike"], name
        assert LIMITS[name](one[name]), (name, one[name])
        assert one[name].get("epochs") == other[name].get("epochs")


@pytest.mark.nightly
def test_all_of_them_train_with_two_ranks_of_torchrun(tmp_path: Path) -> None:
    for name in SCRIPTS:
        needed(name)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["-m", "tests.frontends.ordinary_scripts", *SCRIPTS, str(tmp_path)]
    common = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    common |= {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", *script],
        cwd=tmp_path,
        env=os.environ | common,
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    have_all_trained(tmp_path, list(SCRIPTS))


def loop_of_ray_train(config: dict[str, Any]) -> None:
    import ray.train

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}  # for the script's batches
    found = {name: SCRIPTS[name]() for name in config["names"]}
    Path(config["to"], f"{rank}.json").write_text(json.dumps(found))


def named_actors() -> list[str]:
    import ray

    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["jax", "any"])
def test_a_flax_script_trains_in_ray_train_as_often_as_it_is_started(
    ray_cluster: None, tmp_path: Path, kind: str
) -> None:
    needed("flax_classifier")
    pytest.importorskip("ray.train")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.jax import JaxTrainer

    for number in range(2):
        directory = tmp_path / f"{number}"
        directory.mkdir()
        (JaxTrainer if kind == "jax" else DataParallelTrainer)(
            loop_of_ray_train,
            train_loop_config={"to": str(directory), "names": ["flax_classifier"]},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.01}),
            run_config=RunConfig(name=f"flax {kind}", storage_path=str(tmp_path / "runs")),
        ).fit()
        have_all_trained(directory, ["flax_classifier"])
        eventually(lambda: not any(n.startswith("train-flax") for n in named_actors()))
