"""The task "charlm": a recurrent network in torch that predicts the next character of a text.

The text is what Python's own documentation ships (`pydoc_data.topics`), where it is one that is
known by its hash; else sentences of a small grammar. 1000 steps of any number of workers with seed
0 reach at most 2.3 bits per character of the held-out tenth of the former, and 0.5 of the latter.
"""

import hashlib
import math
import random
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.training.torch_task import Array, TorchTask, import_torch

KNOWN_TEXTS = {
    "37d06970fc926e60c16dff401e441b84752446a36b6b64516c229fdec77e992c": "Python 3.11.7",
    "cec54c2700dcedd6196a9a5ea13103824975d5029b93f7e09c805e9ae1838772": "Python 3.11.2",
    "64a4b3fd3c33d73d0d6368b5fba69d5086fa75e6f73f091235eab317fe823719": "Python 3.12.1",
    "a68b7f5ba5e4f20a336cdc120f82b2921abdbdf57087aa6603ec52f342ce5a1c": "Python 3.13.0",
}
"""SHA-256 of the topics' text, in the order of their names, and whose it is."""
_LENGTH = 64
_EVALUATED = 256


class CharLM(TorchTask):
    """Predict characters with an embedding, one gated recurrent layer and a dense one.

    Args:
        width: units of the recurrent layer.
        batch_size: pieces of 64 characters per batch, over all ranks together.
    """

    name = "charlm"

    def __init__(self, width: int = 96, batch_size: int = 32) -> None:
        self.width = width
        self.batch_size = batch_size

    @override
    def make_module(self) -> Any:
        """Read the text too."""
        text = text_of_topics() or text_of_grammar()
        letters = sorted(set(text))
        index = {letter: number for number, letter in enumerate(letters)}
        numbers = np.array([index[letter] for letter in text], np.int64)
        held_out = len(numbers) // 10
        self.train, self.test = numbers[:-held_out], numbers[-held_out:]
        nn = import_torch(self.name).nn
        return nn.ModuleDict(
            {
                "embedding": nn.Embedding(len(letters), 32),
                "recurrent": nn.GRU(32, self.width, batch_first=True),
                "head": nn.Linear(self.width, len(letters)),
            }
        )

    @override
    def batch(self, step: int, rank: int, world_size: int) -> Array:
        """Return pieces of the text, (batch_size // world_size, 65), whose characters but the first
        are to be predicted.

        They begin where a generator seeded with (seed, step, rank, world_size) says.
        """
        rng = np.random.default_rng([self.seed, 1, step, rank, world_size])
        count = max(1, self.batch_size // world_size)
        begins = rng.integers(0, len(self.train) - _LENGTH, count)
        pieces: Array = self.train[begins[:, None] + np.arange(_LENGTH + 1)]
        return pieces

    @override
    def loss_of(self, module: Any, batch: Array) -> Any:
        """Return the mean cross-entropy of each next character, in nats."""
        torch = import_torch(self.name)
        numbers = torch.from_numpy(batch).to(next(module.parameters()).device)
        states, _ = module["recurrent"](module["embedding"](numbers[:, :-1]))
        guesses = module["head"](states).flatten(0, 1)
        return torch.nn.functional.cross_entropy(guesses, numbers[:, 1:].flatten())

    @override
    def metrics_of(self, module: Any) -> dict[str, float]:
        """Return the bits per character of pieces that are spread over the held-out tenth."""
        begins = np.linspace(0, len(self.test) - _LENGTH - 1, _EVALUATED).astype(np.int64)
        pieces = self.test[begins[:, None] + np.arange(_LENGTH + 1)]
        return {"bits_per_character": self.loss_of(module, pieces).item() / math.log(2.0)}


def text_of_topics() -> str | None:
    """Return the text of Python's documentation; None where it is missing, or another one."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return None
    text = "".join(topics[name] for name in sorted(topics))
    return text if hashlib.sha256(text.encode()).hexdigest() in KNOWN_TEXTS else None


def text_of_grammar(sentences: int = 5000) -> str:
    """Return sentences about workers and shards, the same each time.

    >>> text_of_grammar(1)[-1]
    '.'
    """
    rng = random.Random(0)
    things = ("worker", "shard", "standby", "gradient", "checkpoint", "round", "relay", "tensor")
    verbs = ("waits for", "sends", "reads", "follows", "counts", "keeps", "replaces", "names")
    ways = ("at once", "in order", "once more", "before the next step", "after a restart", "")
    found: list[str] = []
    while len(found) < sentences:
        said = f"{rng.choice(('The', 'Each', 'No'))} {rng.choice(things)} {rng.choice(verbs)} "
        said += f"{rng.choice(('the', 'its', 'every'))} {rng.choice(things)} {rng.choice(ways)}"
        found.append(said.rstrip() + ".")
    return " ".join(found)
