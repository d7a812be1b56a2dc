"""How gradients and parameters get between a worker and the shards."""
