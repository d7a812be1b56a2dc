"""Directories that checkpoints lie in: local disks, and object stores by fsspec."""
