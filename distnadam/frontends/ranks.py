"""Which rank of a data-parallel script this process is, and what all its ranks call the run.

Asked in this order: what the caller gives; the context of Ray Train, if the process runs a train
function; the variables that torchrun and its like set (RANK, WORLD_SIZE); else there is one rank.
Imports neither Ray nor a framework.
"""

import os
import re
import sys
from dataclasses import dataclass

from distnadam.checks import check_count
from distnadam.errors import ConfigError

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_LONGEST_RUN = 48
"""Characters of a run's name, which is a part of an optimizer's."""
_OF_GROUP = 12
"""Digits of a placement group's number that tell it from others."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is among those of its script.

    Attributes:
        rank: its number, 0 to num_workers - 1.
        num_workers: how many there are.
        local_rank: its number among those of its host, which is the GPU that is its; Ray shows an
            actor only its own GPUs (CUDA_VISIBLE_DEVICES), which begin at 0.
        run: what all ranks of this start of the script call it, and no other start does; None where
            nothing says so.
        is_one_host: whether all ranks are known to be on this host.
        ends_with_thread: whether this rank's part ends with the thread that has asked, as a train
            function of Ray Train, whose process is killed then and runs nothing at its exit.
    """

    rank: int = 0
    num_workers: int = 1
    local_rank: int = 0
    run: str | None = None
    is_one_host: bool = True
    ends_with_thread: bool = False


def find_place(rank: int | None = None, num_workers: int | None = None) -> Place:
    """Return this process's place.

    Args:
        rank: the rank that the caller knows; None: it is found.
        num_workers: how many ranks the caller knows of; None: found.

    Raises:
        ConfigError: only one of them is given where it matters, or they do not fit each other.

    >>> find_place(1, 2).rank
    1
    """
    if rank is None and num_workers == 1:
        rank = 0
    if rank is None and num_workers is None:
        return _from_ray_train() or _from_environment() or Place()
    if rank is None or num_workers is None:
        found = _from_ray_train() or _from_environment()
        given = f"rank={rank!r}" if num_workers is None else f"num_workers={num_workers!r}"
        if found is None:
            other = "num_workers" if num_workers is None else "rank"
            raise ConfigError(
                f"{given} needs {other} too: neither torchrun's variables (RANK, WORLD_SIZE) nor "
                "Ray Train say it in this process"
            )
        if num_workers not in (None, found.num_workers) or rank not in (None, found.rank):
            raise ConfigError(
                f"{given}, and this process is rank {found.rank} of {found.num_workers}: leave it "
                "out, or give both rank and num_workers"
            )
        return found
    size = check_count("num_workers", num_workers, least=1)
    if check_count("rank", rank, least=0) >= size:
        raise ConfigError(f"rank must be in [0, {size}), got {rank!r}")
    return Place(rank=rank, num_workers=size, is_one_host=size == 1)


def _from_ray_train() -> Place | None:
    """Return the place of a process that runs a train function of Ray Train; None elsewhere."""
    train = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        local_rank, on_host = context.get_local_rank(), context.get_local_world_size()
        name = context.get_experiment_name()
    except Exception:  # Ray Train says in several ways that nothing trains here
        return None
    if not size:
        return None
    return Place(
        rank=rank,
        num_workers=size,
        local_rank=local_rank,
        run=_as_name("train", name, os.environ.get("MASTER_PORT", ""), _placement_group()),
        is_one_host=on_host == size,
        ends_with_thread=True,
    )


def _placement_group() -> str:
    """Return what is new at each start of Ray Train's workers, where only some set a port."""
    try:
        group = sys.modules["ray"].util.get_current_placement_group()
        return "" if group is None else group.id.hex()[:_OF_GROUP]
    except Exception:  # a Ray that is not connected says so in several ways
        return ""


def _from_environment() -> Place | None:
    """Return the place that torchrun's variables say, which others set too; None without them."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return None
    on_host = os.environ.get("LOCAL_WORLD_SIZE", "")
    is_one_host = on_host == size
    run = _as_name(
        os.environ.get("TORCHELASTIC_RUN_ID", "run"),
        os.environ.get("MASTER_PORT", ""),
        os.environ.get("TORCHELASTIC_RESTART_COUNT", ""),
        str(os.getppid()) if is_one_host else "",  # all ranks have one agent
    )
    try:
        place = Place(
            rank=int(rank),
            num_workers=int(size),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            run=run,
            is_one_host=is_one_host,
        )
    except ValueError:
        place = Place(rank=-1)
    if not 0 <= place.rank < place.num_workers:
        raise ConfigError(f"RANK={rank!r} and WORLD_SIZE={size!r} in the environment name no rank")
    return place


def _as_name(*parts: str) -> str:
    """Return parts as the beginning of a name that an optimizer may have."""
    clean = [_NOT_IN_A_NAME.sub("-", part).strip("-._") for part in parts]
    return "-".join(part for part in clean if part)[-_LONGEST_RUN:].lstrip("-._")
