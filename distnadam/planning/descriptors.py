"""How many files a process of a run may have open, and that the system lets it.

The section Quotas of deploy/README.md gives the formulas in words.
"""

from distnadam.errors import InsufficientResources

_ITSELF = 96
"""Of a process that Ray starts, before it knows others: 60 are usual."""
_STRANGERS = 64
"""Connections that have not said yet who they are; a shard takes no more."""
_EACH = 4
"""For each shard, standby and worker: sockets, and the memory that the two share."""
_FAR_SHARD = 5
"""For each shard that a relay stands for: sockets to it and for workers, and what they wake."""
_NEAR_WORKER = 3
"""For each worker of a relay's host, at each of these shards: a socket, and its gradients twice."""


def of_shard(num_workers: int, num_shards: int, replicas: int) -> int:
    """Return the most descriptors that a shard, a standby or a worker has open.

    >>> of_shard(num_workers=16, num_shards=8, replicas=1)
    288
    """
    return _ITSELF + _STRANGERS + _EACH * (num_workers + num_shards * (1 + replicas))


def of_relay(num_workers: int, num_shards: int) -> int:
    """Return the most descriptors that a relay has open.

    Args:
        num_workers: on its host.
        num_shards: on other hosts.

    >>> of_relay(num_workers=16, num_shards=8)
    520
    """
    return _ITSELF + num_shards * (_FAR_SHARD + _NEAR_WORKER * num_workers)


def needed(num_workers: int, num_shards: int, replicas: int) -> int:
    """Return the most descriptors that one process of a run has open, wherever they all are."""
    shard = of_shard(num_workers, num_shards, replicas)
    return max(shard, of_relay(num_workers, num_shards))


def check(where: str, limit: int, num_workers: int, num_shards: int, replicas: int) -> None:
    """Raise InsufficientResources if a limit of open files is below what a run may need.

    Args:
        where: whose limit it is, the sentence's subject.
        limit: open files that a process there may have.
        num_workers, num_shards, replicas: of the run.
    """
    least = needed(num_workers, num_shards, replicas)
    if 0 <= limit < least:  # below 0 there is none
        raise InsufficientResources(
            f"{where} lets a process open {limit} files, and of {num_workers} workers with "
            f"{num_shards} shards and {replicas} standbys each, a shard may need "
            f"{of_shard(num_workers, num_shards, replicas)}, and a relay beside all workers "
            f"{of_relay(num_workers, num_shards)}: raise the limit (`ulimit -n`, systemd's "
            "LimitNOFILE), or have fewer of them"
        )
