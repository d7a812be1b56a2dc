"""The task "digits": a perceptron that classifies handwritten digits of 8 x 8 pixels.

The images are the UCI set that scikit-learn ships; every fifth one is held out. The backward pass
is written out in NumPy.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnadam.errors import TrainingError
from distnadam.extras import how_to_install

Array = NDArray[Any]


class Digits:
    """Classify digits with a multilayer perceptron.

    Args:
        hidden: the number of units of each hidden layer.
        batch_size: images per batch, over all ranks together.
    """

    name = "digits"

    def __init__(self, hidden: tuple[int, ...] = (256, 128), batch_size: int = 128) -> None:
        self.hidden = hidden
        self.batch_size = batch_size

    def init(self, seed: int) -> Any:
        """Load the images and return He-initialised float32 layers of a bias and a kernel."""
        images, labels = _load()
        held_out = np.arange(len(images)) % 5 == 4
        self.train = images[~held_out]
        self.train_labels = labels[~held_out]
        self.test = images[held_out]
        self.test_labels = labels[held_out]
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        widths = (64, *self.hidden, 10)
        return [
            {
                "kernel": (rng.standard_normal((n, m)) * np.sqrt(2.0 / n)).astype(np.float32),
                "bias": np.zeros(m, np.float32),
            }
            for n, m in pairwise(widths)
        ]

    def batch(self, step: int, rank: int, world_size: int) -> tuple[Array, Array]:
        """Return images, (batch_size // world_size, 64), shifted by up to a pixel, and labels.

        They are drawn by a generator seeded with (seed, step, rank, world_size).
        """
        rng = np.random.default_rng([self.seed, 1, step, rank, world_size])
        picked = rng.integers(0, len(self.train), max(1, self.batch_size // world_size))
        pictures = np.pad(self.train[picked].reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
        down, right = rng.integers(0, 3, (2, len(picked)))
        rows = down[:, None, None] + np.arange(8)[:, None]
        columns = right[:, None, None] + np.arange(8)
        shifted = pictures[np.arange(len(picked))[:, None, None], rows, columns]
        return shifted.reshape(-1, 64), self.train_labels[picked]

    def loss_and_gradients(self, params: Any, batch: tuple[Array, Array]) -> tuple[float, Any]:
        """Return the mean cross-entropy of the batch and its gradients."""
        images, labels = batch
        activations = [images]
        for layer in params[:-1]:
            activations.append(np.maximum(activations[-1] @ layer["kernel"] + layer["bias"], 0))
        logits = activations[-1] @ params[-1]["kernel"] + params[-1]["bias"]
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        each = np.arange(len(labels))
        loss = -float(np.log(probabilities[each, labels] + np.float32(1e-30)).mean())
        delta = probabilities
        delta[each, labels] -= 1
        delta /= np.float32(len(labels))
        gradients: list[dict[str, Array]] = []
        for layer, below in zip(reversed(params), reversed(activations), strict=True):
            gradients.append({"kernel": below.T @ delta, "bias": delta.sum(axis=0)})
            delta = (delta @ layer["kernel"].T) * (below > 0)
        return loss, gradients[::-1]

    def evaluate(self, params: Any) -> dict[str, float]:
        """Return the accuracy on the held-out fifth."""
        x = self.test
        for layer in params[:-1]:
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        guesses = (x @ params[-1]["kernel"] + params[-1]["bias"]).argmax(axis=1)
        return {"accuracy": float((guesses == self.test_labels).mean())}


def _load() -> tuple[Array, Array]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TrainingError(
            f"the task digits needs scikit-learn: {how_to_install('digits')}"
        ) from error
    found = load_digits()
    return (found.data / 16.0).astype(np.float32), found.target.astype(np.int64)
