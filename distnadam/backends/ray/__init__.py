"""The shards as Ray actors. Nothing else in the package imports Ray."""
