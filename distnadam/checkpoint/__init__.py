"""The optimizer's state on disk: what a checkpoint is (FORMAT.md), how one is written, committed,
found and read.
"""
