"""The training loop: `fit`, its tasks, workers, callbacks, records and checkpoints."""
