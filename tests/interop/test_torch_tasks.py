"""Tasks that keep a torch model on themselves: the same bits in threads, in actors and by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, fit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
torch = pytest.importorskip("torch")

STEPS, RANKS = 12, 2


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        )
        self.tied = self.body[0]

    def forward(self, x: Any) -> Any:
        return self.body(x)


class OnSelf:
    """A model on the task; how it takes the parameters differs."""

    name = "on-self"

    def __init__(self, way: str) -> None:
        self.way = way

    def init(self, seed: int) -> Any:
        torch.manual_seed(seed)
        self.model = Net()
        self.seed = seed
        self.loss = lambda x, y: torch.nn.functional.cross_entropy(self.model(x), y)
        return {n: p.detach().numpy().copy() for n, p in self.model.named_parameters()}

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        rng = np.random.default_rng([self.seed, step, rank, world_size])
        x = rng.standard_normal((32, 8)).astype(np.float32)
        return torch.from_numpy(x), torch.from_numpy(rng.integers(0, 3, 32))

    def take(self, params: Any) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if self.way == "copy_":
                    p.data.copy_(torch.tensor(params[name]))
                elif self.way == "data":
                    p.data = torch.tensor(params[name])
        if self.way == "load_state_dict":
            self.model.load_state_dict(
                {n: torch.tensor(v) for n, v in params.items()}, strict=False
            )

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        self.take(params)
        self.model.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        return float(loss.detach()), {
            n: p.grad.numpy().copy() for n, p in self.model.named_parameters()
        }

    def evaluate(self, params: Any) -> dict[str, float]:
        self.take(params)
        self.model.eval()
        x, y = self.batch(10**6, 0, 1)
        with torch.no_grad():
            return {"accuracy": float((self.model(x).argmax(1) == y).float().mean())}


def weights(directory: Path) -> dict[str, bytes]:
    with DistNadam.restore(directory, num_shards=1, backend="local") as optimizer:
        return {name: array.tobytes() for name, array in optimizer.get_params().items()}


def trained(directory: Path, way: str, backend: Any, evaluate_every: int | None) -> Any:
    torch.set_num_threads(1)  # as in an actor
    history = fit(
        OnSelf(way),
        steps=STEPS,
        num_workers=RANKS,
        backend=backend,
        evaluate_every=evaluate_every,
        checkpoint_dir=directory,
        verbose=False,
    )
    return weights(directory), history.losses, history.metrics


@pytest.mark.parametrize("way", ["load_state_dict", "data", "copy_"])
def test_threads_train_a_model_on_self_as_one_thread_does(way: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tasks = [OnSelf(way) for _ in range(RANKS)]
    params = OnSelf(way).init(0)
    for task in tasks:
        task.init(0)
    with DistNadam(backend="local").build(params) as optimizer:
        for step in range(STEPS):
            params = optimizer.get_params()
            each = [
                task.loss_and_gradients(params, task.batch(step, rank, RANKS))[1]
                for rank, task in enumerate(tasks)
            ]
            optimizer.apply_gradients(
                {name: sum(grads[name] for grads in each) / np.float32(RANKS) for name in params}
            )
        by_hand = {name: array.tobytes() for name, array in optimizer.get_params().items()}
    for run in range(3):
        assert trained(tmp_path / str(run), way, "local", 3)[0] == by_hand


def test_a_local_run_ends_with_the_bits_of_one_on_ray(ray_cluster: None, tmp_path: Path) -> None:
    local = trained(tmp_path / "local", "load_state_dict", "local", 3)
    assert trained(tmp_path / "ray", "load_state_dict", "ray", 3) == local
