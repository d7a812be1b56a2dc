"""The built-in tasks in torch reach their figures, by one command, whatever the workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distnadam import fit
from distnadam.cli import main
from distnadam.training.tasks import charlm
from distnadam.training.tasks.charlm import CharLM, text_of_grammar, text_of_topics
from distnadam.training.tasks.digits_torch import DigitsTorch

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
