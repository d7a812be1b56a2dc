"""Scripts as users write them, in which the import and the line that makes the optimizer are ours:
run alone, by torchrun, or by Ray Train. Each returns how well it has trained, and what its ranks
must have alike.

    python -m tests.frontends.ordinary_scripts cnn characters ... DIRECTORY
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Found = dict[str, Any]


def place() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.data / 16).astype(np.float32), found.target


def weights_of(model: Any) -> list[float]:
    return [float(p.double().sum()) for p in model.parameters()]


def cnn(optimizer_of: Any = None, scaler_of: Any = None) -> Found:
    """A CNN with BatchNorm, a one-cycle schedule, clipping, and mixed precision on a CPU."""
    import torch
    from torch import nn

    import distnadam

    rank, size = place()
    torch.manual_seed(0)
    x, y = digits()
    images, labels = torch.tensor(x).reshape(-1, 1, 8, 8), torch.tensor(y)
    data = torch.utils.data.TensorDataset(images[:1400], labels[:1400])
    sampler = torch.utils.data.distributed.DistributedSampler(data, size, rank)
    loader = torch.utils.data.DataLoader(data, 64 // size, sampler=sampler, drop_last=True)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    make = optimizer_of or distnadam.torch.DistAdamW
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.01)
    scaler = (scaler_of or distnadam.torch.GradScaler)("cpu")
    epochs = 4
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, total_steps=epochs * len(loader)
    )
    clip = getattr(optimizer, "clip_grad_norm_", None)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch, target in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip(1.0) if clip else nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    return {"accuracy": accuracy, "alike": weights_of(model), "rate": schedule.get_last_lr()}


def characters(optimizer_of: Any = None) -> Found:
    """A character model whose gradients are of four batches, and whose weights are averaged."""
    import torch
    from torch import nn
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    import distnadam

    rank, _ = place()
    torch.manual_seed(0)
    text = Path(nn.modules.rnn.__file__).read_text()
    known = sorted(set(text))
    data = torch.tensor([known.index(c) for c in text])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(len(known), 24)
            self.cells = nn.GRU(24, 48, batch_first=True)
            self.head = nn.Linear(48, len(known))

        def forward(self, x: Any) -> Any:
            return self.head(self.cells(self.embedding(x))[0])

    model = Model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    make = optimizer_of or distnadam.torch.DistAdamW
    optimizer = make(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(rank), []
    for _ in range(25):
        total = 0.0
        for _ in range(4):
            begins = torch.randint(0, len(data) - 65, (8, 1), generator=generator)
            batch = data[begins + torch.arange(65)]
            found = model(batch[:, :-1]).flatten(0, 1)
            loss = nn.functional.cross_entropy(found, batch[:, 1:].flatten()) / 4
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        losses.append(total)
    return {"losses": losses, "alike": weights_of(model) + weights_of(averaged)}


def gan(optimizer_of: Any = None) -> Found:
    """A GAN of two optimizers, whose discriminator's weights are clamped now and then."""
    import torch
    from torch import nn

    import distnadam

    rank, _ = place()
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    make = optimizer_of or distnadam.torch.DistAdam
    of_generator = make(generator.parameters(), lr=1e-2, betas=(0.5, 0.999))
    of_critic = make(critic.parameters(), lr=1e-2, betas=(0.5, 0.999))
    judge = nn.BCEWithLogitsLoss()
    randoms = torch.Generator().manual_seed(rank)
    ones, zeros, centre = torch.ones(32, 1), torch.zeros(32, 1), torch.tensor([1.0, -1.0])
    for step in range(120):
        real = torch.randn(32, 2, generator=randoms) * 0.3 + centre
        made = generator(torch.randn(32, 4, generator=randoms))
        of_critic.zero_grad()
        (judge(critic(real), ones) + judge(critic(made.detach()), zeros)).backward()
        of_critic.step()
        of_generator.zero_grad()
        judge(critic(made), ones).backward()
        of_generator.step()
        if step % 20 == 19:
            for p in critic.parameters():
                p.data.clamp_(-1, 1)
    with torch.no_grad():
        mean = generator(torch.randn(512, 4, generator=torch.Generator().manual_seed(9))).mean(0)
    gap = (mean - centre).abs().max().item()
    return {"gap": gap, "alike": weights_of(generator) + weights_of(critic)}


def keras_classifier(optimizer_of: Any = None) -> Found:
    """A classifier that stops early and keeps its best weights in a file."""
    import keras

    import distnadam

    rank, size = place()
    keras.utils.set_random_seed(0)
    x, y = digits()
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=(optimizer_of or distnadam.keras.DistNadam)(2e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    kept = Path(os.environ["SCRIPT_DIRECTORY"], f"best-{rank}.keras")
    mine = slice(rank * 1408 // size, (rank + 1) * 1408 // size)
    history = model.fit(
        x[mine],
        y[mine],
        batch_size=64 // size,
        epochs=12,
        validation_data=(x[1408:], y[1408:]),  # the same on all ranks, which so stop alike
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(kept, save_best_only=True),
        ],
    )
    again = keras.models.load_model(kept)
    return {
        "accuracy": model.evaluate(x[1408:], y[1408:], verbose=0)[1],
        "kept": again.evaluate(x[1408:], y[1408:], verbose=0)[1],
        "alike": [float(w.astype(np.float64).sum()) for w in model.get_weights()],
        "epochs": len(history.history["loss"]),
    }


def flax_classifier(optimizer_of: Any = None) -> Found:
    """A Flax model with a cosine schedule."""
    import jax
    import optax
    from flax import linen as nn

    import distnadam

    rank, size = place()
    x, y = digits()
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    params = model.init(jax.random.key(0), x[:1])
    schedule = optax.cosine_decay_schedule(1e-2, 150)
    optimizer = distnadam.jax.DistNadamW(schedule)

    @jax.jit
    def gradients(params: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            found = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

        return jax.grad(loss)(params)

    rng = np.random.default_rng(rank)
    for _ in range(150):
        chosen = rng.integers(0, 1400, 64 // size)
        params = optimizer.step(params, gradients(params, x[chosen], y[chosen]))
    accuracy = (model.apply(params, x[1400:]).argmax(1) == y[1400:]).mean()
    sums = [float(leaf.sum()) for leaf in jax.tree.leaves(params)]
    return {"accuracy": float(accuracy), "alike": sums}


SCRIPTS: dict[str, Callable[..., Found]] = {
    script.__name__: script for script in (cnn, characters, gan, keras_classifier, flax_classifier)
}


def main() -> None:
    *names, directory = sys.argv[1:]
    os.environ["SCRIPT_DIRECTORY"] = directory
    found = {name: SCRIPTS[name]() for name in names}
    Path(directory, f"{place()[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
