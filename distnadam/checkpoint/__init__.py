"""The optimizer's state on disk: the format (FORMAT.md), and writing, finding and reading it."""
