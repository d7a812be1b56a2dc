"""BatchNorm of a real torch: its averages are no parameters, and a task keeps them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, fit
from distnadam.checkpoint import store
from distnadam.errors import StructureError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
torch = pytest.importorskip("torch")

STEPS, RANKS = 12, 2


class Careless:
    """A model with BatchNorm on the task."""

    name = "normed"

    def init(self, seed: int) -> Any:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 3),
        )
        self.seed = seed
        return {n: p.detach().numpy().copy() for n, p in self.model.named_parameters()}

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        rng = np.random.default_rng([self.seed, step, rank, world_size])
        x = (3 + 2 * rng.standard_normal((32, 8))).astype(np.float32)
        return torch.from_numpy(x), torch.from_numpy(rng.integers(0, 3, 32))

    def take(self, params: Any) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.tensor(params[name]))

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        self.take(params)
        self.model.train()
        self.model.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        grads = {n: p.grad.numpy().copy() for n, p in self.model.named_parameters()}
        return float(loss.detach()), grads

    def evaluate(self, params: Any) -> dict[str, float]:
        self.take(params)
        self.model.eval()
        x, _ = self.batch(10**6, 0, 1)
        with torch.no_grad():
            return {"output": float(self.model(x).abs().sum())}


class Normed(Careless):
    def state(self) -> Any:
        return dict(self.model.named_buffers())

    def load_state(self, state: Any) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(torch.tensor(state[name]))


def trained(directory: Path, task: Any, steps: int = STEPS) -> Any:
    return fit(
        task,
        steps=steps,
        num_workers=RANKS,
        backend="local",
        evaluate_every=5,
        checkpoint_dir=directory,
        verbose=False,
    )


def test_evaluations_and_resumed_runs_have_rank_0s_averages(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tasks = [Normed() for _ in range(RANKS)]
    params, _ = [task.init(0) for task in tasks]
    with DistNadam(backend="local").build(params) as optimizer:
        for step in range(STEPS):
            params = optimizer.get_params()
            each = [
                task.loss_and_gradients(params, task.batch(step, rank, RANKS))[1]
                for rank, task in enumerate(tasks)
            ]
            optimizer.apply_gradients({n: (each[0][n] + each[1][n]) / RANKS for n in params})
        by_hand = tasks[0].evaluate(optimizer.get_params())
    averages = {n: b.numpy() for n, b in tasks[0].model.named_buffers()}
    assert averages["1.num_batches_tracked"] == STEPS

    whole = trained(tmp_path / "whole", Normed())
    for steps in (7, STEPS):
        parts = trained(tmp_path / "parts", Normed(), steps)
    for directory, history in (("whole", whole), ("parts", parts)):
        assert history.metrics == by_hand
        _, manifest, _ = store.find(tmp_path / directory)
        kept = manifest.user_data["task_state"]
        assert {n: (a.dtype, a.tobytes()) for n, a in kept.items()} == {
            n: (a.dtype, a.tobytes()) for n, a in averages.items()
        }


def test_a_task_that_forgets_them_is_told_their_names(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no parameter \(model\.1\.running_mean, model\.1\.run"):
        trained(tmp_path, Careless(), 1)


def test_a_state_dict_is_refused_as_parameters_with_the_remedy() -> None:
    task = Careless()
    task.init(0)
    with pytest.raises(
        StructureError,
        match=r"'1\.num_batches_tracked': .* got int64 \(Tensor\); if it is a buffer, .* give "
        r"dict\(model\.named_parameters\(\)\), .* state and load_state",
    ):
        DistNadam(backend="local").build(task.model.state_dict())
