"""The tasks that the package brings."""
