"""The built-in task: it learns, its batches are seeded, and its gradients are those of its loss."""

from pathlib import Path

import numpy as np
import pytest

from distnadam import fit
from distnadam.training.tasks.digits import Digits


@pytest.mark.parametrize(
    "num_workers",
    [pytest.param(1, marks=pytest.mark.nightly), 2, pytest.param(4, marks=pytest.mark.nightly)],
)
def test_it_reaches_97_percent_on_the_held_out_fifth(num_workers: int, tmp_path: Path) -> None:
    history = fit(
        Digits(),
        steps=1000,
        num_workers=num_workers,
        backend="local",
        checkpoint_dir=tmp_path,
        verbose=False,
    )
    assert history.metrics["accuracy"] >= 0.97


def test_batches_are_a_function_of_seed_step_rank_and_world_size() -> None:
    task, again = Digits(), Digits()
    task.init(3)
    again.init(3)
    assert all(
        np.array_equal(a, b) for a, b in zip(task.batch(5, 1, 2), again.batch(5, 1, 2), strict=True)
    )
    others = [task.batch(5, 0, 2), task.batch(6, 1, 2), task.batch(5, 1, 3)]
    again.init(4)
    others.append(again.batch(5, 1, 2))
    assert not any(np.array_equal(task.batch(5, 1, 2)[0], other[0]) for other in others)
    assert len(task.batch(0, 0, 1)[1]) == 2 * len(task.batch(0, 0, 2)[1])


def test_no_held_out_image_is_trained_on() -> None:
    task = Digits()
    task.init(0)
    assert len(task.test) == 359
    assert len(task.train) + len(task.test) == 1797


def test_its_gradients_are_the_slopes_of_its_loss() -> None:
    task = Digits(hidden=(7,), batch_size=16)
    params = [{k: v.astype(np.float64) for k, v in layer.items()} for layer in task.init(0)]
    batch = task.batch(0, 0, 1)
    _, gradients = task.loss_and_gradients(params, batch)
    for layer, gradient in zip(params, gradients, strict=True):
        for key, values in layer.items():
            index = tuple(n // 2 for n in values.shape)
            kept = values[index]
            losses = []
            for shift in (1e-6, -1e-6):
                values[index] = kept + shift
                losses.append(task.loss_and_gradients(params, batch)[0])
            values[index] = kept
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(
                gradient[key][index], rel=1e-3, abs=1e-6
            )
