"""Where the shards live: in this process, or in Ray actors. One seam (base), one host of a shard
(host), two implementations.
"""
