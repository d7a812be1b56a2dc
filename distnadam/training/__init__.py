"""The training loop over the optimizer: tasks, workers in threads or Ray actors, records,
checkpoints, progress.
"""
