"""Where checkpoints are stored: local disks (`local`) and fsspec URLs (`remote`)."""
