"""The built-in tasks in torch reach their figures, by one command, whatever the workers."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from typing_extensions import override

from distnadam import DistNadam, fit
from distnadam.checkpoint import store
from distnadam.cli import main
from distnadam.errors import TrainingError
from distnadam.training.task_state import state_of
from distnadam.training.tasks import charlm
from distnadam.training.tasks.charlm import CharLM, text_of_grammar, text_of_topics
from distnadam.training.tasks.digits_torch import DigitsTorch
from distnadam.training.torch_task import TorchTask

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow


def trained(name: str, workers: int, tmp_path: Path) -> dict[str, Any]:
    """What `distnadam train NAME --workers N` prints of a run in this process."""
    given = [name, "--workers", str(workers), "--local", "--quiet", "--json"]
    given += ["--checkpoint-dir", str(tmp_path)]
    done = CliRunner().invoke(main, ["train", *given])
    assert done.exit_code == 0, done.output
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_digits_in_torch_reach_98_5_percent_of_the_held_out_fifth(
    workers: int, tmp_path: Path
) -> None:
    assert trained("digits-torch", workers, tmp_path)["accuracy"] >= 0.985


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("text", ["topics", "grammar"])
def test_charlm_reaches_its_bits_per_character(
    text: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text == "grammar":
        monkeypatch.setattr(charlm, "text_of_topics", lambda: None)
    elif text_of_topics() is None:
        pytest.skip("this Python's topics are not among those that charlm knows")
    found = trained("charlm", workers, tmp_path)["bits_per_character"]
    assert found <= {"topics": 2.3, "grammar": 0.5}[text]


def test_charlm_learns_and_its_bits_do_not_depend_on_shards(tmp_path: Path) -> None:
    runs = [
        fit(
            CharLM(width=16, batch_size=8),
            steps=60,
            num_workers=2,
            num_shards=shards,
            backend="local",
            checkpoint_dir=tmp_path / str(shards),
            verbose=False,
        )
        for shards in (1, 3)
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses[-1] < 0.85 * runs[0].losses[0]
    assert runs[0].metrics == runs[1].metrics


@pytest.mark.parametrize("kind", [DigitsTorch, CharLM])
def test_gradients_are_the_slopes_of_the_loss_and_batches_seeded(kind: Any) -> None:
    task, again = kind(batch_size=4), kind(batch_size=4)
    params = task.init(3)
    for one, other in zip(params.values(), again.init(3).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(task.batch(5, 1, 2), again.batch(5, 1, 2), strict=True):
        np.testing.assert_array_equal(one, other)
    batch = task.batch(0, 0, 1)
    _, gradients = task.loss_and_gradients(params, batch)
    gradients = {name: np.array(gradient) for name, gradient in gradients.items()}
    name = max(params, key=lambda name: float(np.abs(gradients[name]).max()))
    index = np.unravel_index(np.abs(gradients[name]).argmax(), params[name].shape)
    losses = []
    for shift in (1e-2, -1e-2):
        moved = params | {name: params[name].copy()}
        moved[name][index] += shift
        losses.append(task.loss_and_gradients(moved, batch)[0])
    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(float(gradients[name][index]), rel=0.05)


def test_the_text_of_our_own_is_the_same_each_time() -> None:
    text = text_of_grammar()
    assert text == text_of_grammar() and 200_000 < len(text) < 300_000
    assert text.startswith(text_of_grammar(10)[:-1])


class OnAGpu(DigitsTorch):
    """Where no Ray says so."""

    device = "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this process sees no GPU")
def test_a_task_for_a_gpu_computes_there_what_it_computes_on_the_cpu() -> None:
    there, here = OnAGpu(batch_size=4), DigitsTorch(batch_size=4)
    params = here.init(3)
    there.init(3)
    batch = here.batch(0, 0, 1)
    (loss, found), (expected, gradients) = (
        task.loss_and_gradients(params, batch) for task in (there, here)
    )
    assert next(there.module.parameters()).device.type == "cuda"
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-3, atol=1e-5)
    assert there.evaluate(params).keys() == here.evaluate(params).keys()


class Usual(TorchTask):
    """What a torch user writes: batch normalisation and dropout, and not a word of either."""

    def __init__(self, *, one_batch: bool = False) -> None:
        self.one_batch = one_batch

    @override
    def make_module(self) -> Any:
        return torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 1),
        )

    @override
    def batch(self, step: int, rank: int, world_size: int) -> Any:
        seed = 0 if self.one_batch else 1000 * step + rank
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))

    @override
    def loss_of(self, module: Any, batch: Any) -> Any:
        return (module(batch)[:, 0] - batch.sum(1)).square().mean()

    @override
    def metrics_of(self, module: Any) -> dict[str, float]:
        return {"mean": module[1].running_mean.abs().sum().item()}


def bits(directory: Path) -> dict[str, bytes]:
    with DistNadam.restore(directory, backend="local") as optimizer:
        params: dict[str, Any] = optimizer.get_params()
    state = store.load(str(directory)).user_data["task_state"]
    return {name: array.tobytes() for name, array in (params | state).items()}


@pytest.mark.filterwarnings("error")
def test_batch_normalisation_and_dropout_need_no_word_and_resume_to_the_bit(
    tmp_path: Path,
) -> None:
    given: Any = {"num_workers": 3, "backend": "local", "verbose": False}
    whole = fit(Usual(), steps=12, checkpoint_dir=tmp_path / "whole", **given)
    for steps in (5, 12):
        parts = fit(Usual(), steps=steps, checkpoint_dir=tmp_path / "parts", **given)
    assert parts.metrics == whole.metrics
    assert whole.metrics["mean"] > 0, "the averages that training left, not those of init"
    expected = bits(tmp_path / "whole" / "step_00000012")
    assert bits(tmp_path / "parts" / "step_00000012") == expected
    assert "1.running_mean" in expected


def test_dropout_draws_anew_where_the_batch_comes_again() -> None:
    task = Usual(one_batch=True)
    params, batch = task.init(0), task.batch(0, 0, 1)
    generator = torch.get_rng_state()
    losses = [task.loss_and_gradients(params, batch)[0] for _ in range(2)]
    assert losses[0] == losses[1]
    for step in range(1, 5):  # so little that a loss of the same draws would stay as it is
        moved = params | {"3.bias": params["3.bias"] + np.float32(step * 1e-6)}
        losses.append(task.loss_and_gradients(moved, batch)[0])
    assert max(losses) - min(losses) > 0.01
    assert torch.equal(torch.get_rng_state(), generator), "the caller's draws are not disturbed"


def test_a_module_without_buffers_is_a_task_without_state() -> None:
    task = DigitsTorch()
    task.init(0)
    assert not hasattr(task, "state")
    usual = pickle.loads(pickle.dumps(_after_init(Usual())))
    assert usual.state().keys() == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    usual.module[1].running_mean = usual.module[1].running_mean.bfloat16()
    usual.load_state({name: np.full_like(each, 3) for name, each in state_of(usual).items()})
    assert usual.module[1].num_batches_tracked == 3
    assert usual.module[1].running_mean.eq(3).all()
    named = Usual()
    named.state = "of mind"  # type: ignore[attr-defined]
    named.init(0)
    assert named.state == "of mind", "an attribute of the user's stays"  # type: ignore[attr-defined]


def _after_init(task: Any) -> Any:
    task.init(0)
    return task


@pytest.mark.parametrize(
    ("loss_of", "said"),
    [
        (lambda module, batch: module(batch).mean().item(), r"got float: leave out \.item\(\)"),
        (lambda module, batch: module(batch), r"got one of shape \(16, 1\): take its mean"),
        (lambda module, batch: batch.mean(), "that no parameter takes part in"),
    ],
)
def test_a_loss_that_is_none_is_said_with_what_to_do(loss_of: Any, said: str) -> None:
    task = Usual()
    params = task.init(0)
    task.loss_of = loss_of  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=said):
        task.loss_and_gradients(params, task.batch(0, 0, 1))
