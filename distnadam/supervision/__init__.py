"""Recovery: what is decided and done when processes die, and how the state moves to other shards.

`supervisor` watches; `observer` looks, `policy` decides (pure), `executor` acts. `process_manager`
is the seam to what the processes run on.
"""
