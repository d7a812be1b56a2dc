"""The configuration of a shard, and its status: plain records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.tensors.layout import Layout, Ranges

Owners = dict[int, tuple[int, str]]
"""By rank: the incarnation of its worker, and the token of that one's process."""


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """The configuration of one shard, given to it when it is made.

    Attributes:
        index: its place among the shards.
        num_shards: shards of the optimizer.
        num_workers: ranks.
        replicas: standbys of each shard.
        name: the optimizer's name in the cluster; None if it has none.
        config: the hyper-parameters.
        options: the options.
        layout: the model's tensors.
        ranges: the elements that this shard holds.
        cuts: what each shard holds; () where that is `layout.cuts(num_shards)`.
        run_id: begins the names of this optimizer's processes in the cluster.
        layout_generation: how often the state was resharded.
        run: `Settings.run`, for whoever saves.
    """

    index: int
    num_shards: int
    num_workers: int
    replicas: int
    name: str | None
    config: NadamConfig
    options: Options
    layout: Layout
    ranges: Ranges
    cuts: tuple[Ranges, ...] = ()
    run_id: str = ""
    layout_generation: int = 0
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Describe:
    """Asks for the shard's status, and with `spec` for its spec too; always legal."""

    spec: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """Answer to `Describe`: the status of one shard.

    Attributes:
        epoch: the current epoch.
        round: the last decided round.
        iterations: steps applied so far.
        skipped: rounds that applied no step.
        waiting_for: the ranks whose push the next round lacks.
        left: the ranks whose worker left.
        dead: the ranks whose worker died.
        members: the ranks that the next round needs.
        config: the hyper-parameters.
        revision: how often they were replaced since the shards began or went back.
        applied_revision: that of the last applied step.
        loss_scale: as of a `RoundResult`.
        gradient_norm: as of a `RoundResult`.
        overrides: the learning rates and betas that were of the last applied step alone.
        spec: the shard's spec, if asked for.
        phase: the phase, in words.
        holder: the token of the caller that holds the shard, if any.
        busy: whether it reads or writes files.
        epoch_reason: why the epoch began.
        schedule: the membership by round.
        newest: by rank, the newest incarnation.
        replicated: the last round that the standby has; None without one.
        given_up: the ranks that no worker takes over.
        saved: the directory of checkpoints last written to or read from.
        retired: whether other shards hold its ranges.
        live_owners: by rank, the worker that holds it, as far as this shard knows.
        highest_round: the latest round ever decided, also before a rewind.
        stepped: the last round that was a direct step.
        idle_s: seconds since the shard last computed a step, norms or a load.
        stepped_s: seconds in which its process has computed steps, so far.
        traffic: by another host's address, the bytes sent there and received from there by TCP.
        links: likewise, the bytes per second at which the system delivered there last, if known.
    """

    epoch: int
    round: int
    iterations: int
    skipped: int
    waiting_for: tuple[int, ...]
    left: tuple[int, ...]
    dead: tuple[int, ...]
    members: tuple[int, ...]
    config: NadamConfig
    revision: int
    applied_revision: int
    overrides: bytes = b""
    loss_scale: float = 0.0
    gradient_norm: float = -1.0
    spec: ShardSpec | None = None
    phase: str = ""
    holder: str | None = None
    busy: bool = False
    epoch_reason: str = ""
    schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()
    newest: dict[int, int] = field(default_factory=dict)
    replicated: int | None = None
    given_up: tuple[int, ...] = ()
    saved: str | None = None
    retired: bool = False
    live_owners: Owners = field(default_factory=dict)
    highest_round: int = 0
    stepped: int = 0
    idle_s: float = 0.0
    stepped_s: float = 0.0
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    links: Mapping[str, float] = field(default_factory=dict)
