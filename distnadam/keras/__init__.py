"""Keras 3: optimizers for `model.compile`, on its torch and JAX backends, whose state is on shards.

    model.compile(optimizer=distnadam.keras.DistNadam(learning_rate=1e-3), loss=...)
    model.fit(x, y, callbacks=[distnadam.keras.ClusterCheckpoint("runs/mine")])

`restore(model, "runs/mine")` goes on from such a checkpoint. A `.keras` file holds the moments too,
in the order of keras.optimizers.Nadam and Adam, which take them.
"""

from distnadam.keras.checkpoints import ClusterCheckpoint, restore
from distnadam.keras.optimizers import DistAdam, DistAdamW, DistNadam, DistNadamW

__all__ = ["ClusterCheckpoint", "DistAdam", "DistAdamW", "DistNadam", "DistNadamW", "restore"]
