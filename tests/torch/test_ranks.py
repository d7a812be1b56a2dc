"""Several ranks: each a process of torchrun, an actor of one's own, or a worker of Ray Train."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
torch = pytest.importorskip("torch")

import distnadam  # noqa: E402
from tests.torch.models import batches, bits, loss_of, make  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw in `ranks_script.py`."""
    directory = tmp_path_factory.mktemp("torchrun")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "tests/torch/ranks_script.py"), str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN": "t" * 64}
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", *script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def reference() -> Iterator[list[Any]]:
    """The parameters of the script's first part in one process, after 5, 8 and 10 steps."""
    model = make()
    optimizer = torch.optim.NAdam(
        model.parameters(), lr=0.01, weight_decay=0.01, decoupled_weight_decay=True
    )

    def train(count: int, seed: int) -> None:
        every = batches(2 * count, seed)
        for pair in zip(every[::2], every[1::2], strict=True):
            optimizer.zero_grad()
            (sum(loss_of(model, batch) for batch in pair) / 2).backward()
            optimizer.step()

    train(5, 1)
    yield list(model.parameters())
    model.load_state_dict(make(5).state_dict())
    model[0].weight.data.clamp_(-0.1, 0.1)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    train(3, 2)
    yield list(model.parameters())
    for each in optimizer.state.values():
        each["exp_avg"].mul_(0.5)
    train(2, 4)
    yield list(model.parameters())


def test_ranks_step_as_one_process_that_has_both_batches_whatever_all_change_alike(
    torchrun: list[dict[str, Any]],
) -> None:
    one, other = torchrun
    for when, params in zip(("after 5", "after 8", "after 10"), reference(), strict=True):
        assert one[when] == other[when]
        for got, expected in zip(one[when], params, strict=True):
            values = torch.frombuffer(bytearray.fromhex(got), dtype=torch.float32)
            assert torch.allclose(values, expected.detach().flatten(), atol=5e-6)
    assert one["steps"] == [8.0] * 4


def test_what_one_rank_changes_alone_is_refused_by_name_on_all(
    torchrun: list[dict[str, Any]],
) -> None:
    one, other = torchrun
    for name, said in (
        ("one changed", "rank 0 changed nothing, rank 1 changed '2.bias' ("),
        ("one's rate", "rank 0 has lr=0.01, beta_1=0.9, beta_2=0.999, rank 1 has lr=1.01"),
        ("unseeded", "rank 0 changed nothing, rank 1 changed '0.weight' ("),
    ):
        assert one[name] == other[name] and said in one[name]
        assert one[name].startswith("RanksDisagree: ")


def test_the_loss_scale_of_all_ranks_follows_the_overflow_of_one(
    torchrun: list[dict[str, Any]],
) -> None:
    one, other = torchrun
    assert one["scales"] == other["scales"] == [64.0, 32.0, 32.0, 64.0, 32.0, 32.0]
    assert one["scaled"] == other["scaled"]
    assert one["torch's scaler"] == other["torch's scaler"]
    assert "use distnadam.torch.GradScaler" in one["torch's scaler"]


def test_a_rank_without_a_gradient_counts_as_zeros_and_hangs_nobody(
    torchrun: list[dict[str, Any]],
) -> None:
    one, other = torchrun
    assert one["absent"] == other["absent"]
    assert one["absent steps"] == other["absent steps"] == [3.0] * 4


def test_what_is_rounded_on_its_way_is_the_mean_of_rounded_gradients_at_rounded_parameters(
    torchrun: list[dict[str, Any]],
) -> None:
    one, other = torchrun
    model = make()
    optimizer = distnadam.torch.DistNadam(
        model.named_parameters(), lr=1e-3, backend="local", pull_dtype="bfloat16"
    )
    for every in (batches(8, 1), batches(8, 2)):
        for pair in zip(every[::2], every[1::2], strict=True):
            gradients = []
            for batch in pair:
                model.zero_grad()
                loss_of(model, batch).backward()
                gradients.append([p.grad.bfloat16().float() for p in model.parameters()])
            for p, *given in zip(model.parameters(), *gradients, strict=True):
                p.grad = sum(given) / 2
            optimizer.step()
    masters = [optimizer.state[p]["master"].numpy().tobytes() for p in model.parameters()]
    for seen in (one, other):
        assert seen["rounded"] == [b.hex() for b in bits(model)]
        assert seen["rounded masters"] == [master.hex() for master in masters]
        assert set(seen["dtypes"]) == {"bfloat16"}
    assert one["rounded"] != one["rounded masters"]
    assert "rank 1: pull_dtype=None, and rank 0 has 'bfloat16'" in other["other rounding"]


def test_clipping_is_of_the_mean_of_all_ranks_as_with_ddp(torchrun: list[dict[str, Any]]) -> None:
    for seen in torchrun:
        assert seen["clipped"] < 5e-6
        assert seen["norms"][0] == pytest.approx(seen["norms"][1], rel=1e-4)


def test_a_model_in_ddp_is_refused_unless_its_all_reduce_is_off(
    torchrun: list[dict[str, Any]],
) -> None:
    for seen in torchrun:
        assert "LifecycleError: the model is wrapped in DistributedDataParallel" in seen["wrapped"]
        assert seen["no all-reduce"] is True


class Member:
    """A rank in an actor of one's own: the same two lines, and its rank."""

    def __init__(self, rank: int, name: str) -> None:
        import distnadam

        self.rank = rank
        self.model = make()
        self.optimizer = distnadam.torch.DistNadam(
            self.model.named_parameters(), lr=0.01, rank=rank, num_workers=2, name=name
        )

    def train(self, begin: int, end: int) -> list[bytes]:
        for batch in batches(2 * end, 1)[2 * begin + self.rank :: 2]:
            self.optimizer.zero_grad()
            loss_of(self.model, batch).backward()
            self.optimizer.step()
        return bits(self.model)

    def close(self) -> None:
        self.optimizer.close()


def test_actors_of_one_s_own_train_and_one_that_was_killed_comes_back(ray_cluster: None) -> None:
    import ray

    make_member = ray.remote(num_cpus=0, max_restarts=0)(Member).remote
    members = [make_member(rank, "torch-actors") for rank in range(2)]
    one, other = ray.get([m.train.remote(0, 3) for m in members], timeout=200)
    assert one == other
    ray.kill(members[1])
    members[1] = make_member(1, "torch-actors")
    one, other = ray.get([m.train.remote(3, 6) for m in members], timeout=200)
    assert one == other
    model = make()
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
    every = batches(12, 1)
    for pair in zip(every[::2], every[1::2], strict=True):
        optimizer.zero_grad()
        (sum(loss_of(model, batch) for batch in pair) / 2).backward()
        optimizer.step()
    for got, expected in zip(one, model.parameters(), strict=True):
        values = torch.frombuffer(bytearray(got), dtype=torch.float32)
        assert torch.allclose(values, expected.detach().flatten(), atol=5e-6)
    ray.get([m.close.remote() for m in members], timeout=100)
    with pytest.raises(distnadam.errors.NotRunning):
        distnadam.DistNadam.connect("torch-actors")


def loop_of_ray_train(config: dict[str, Any]) -> None:
    import ray.train

    import distnadam

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    model = make()
    optimizer = distnadam.torch.DistNadam(model.named_parameters(), lr=0.01)
    for batch in batches(size * 4, 1)[rank::size]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    Path(config["to"], f"{rank}").write_bytes(b"".join(bits(model)))


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own imports
def test_the_same_two_lines_train_in_ray_train(ray_cluster: None, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        loop_of_ray_train,
        train_loop_config={"to": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.01}),
        run_config=RunConfig(name="two lines", storage_path=str(tmp_path / "runs")),
    ).fit()
    one, other = ((tmp_path / f"{rank}").read_bytes() for rank in range(2))
    model = make()
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
    every = batches(8, 1)
    for pair in zip(every[::2], every[1::2], strict=True):
        optimizer.zero_grad()
        (sum(loss_of(model, batch) for batch in pair) / 2).backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert one == other
    assert torch.allclose(
        torch.frombuffer(bytearray(one), dtype=torch.float32), expected, atol=5e-6
    )
