"""What a shard is told once, and what it says of itself whenever it is asked: plain records."""

from dataclasses import dataclass, field

from distnadam.config import NadamConfig, Options
from distnadam.schedules import Rate
from distnadam.tensors.layout import Layout, Ranges

Owners = dict[int, tuple[int, str]]
"""By rank: the incarnation of its worker, and the token of that one's process."""


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """What a shard is told once, when it is made.

    `run_id` begins the names by which the cluster knows this optimizer's processes;
    `layout_generation` counts how often the state was cut anew.
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
    run_id: str = ""
    layout_generation: int = 0


@dataclass(frozen=True)
class Describe:
    """Asks for the shard's status, and with `spec` for its spec too; always legal."""

    spec: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """A shard's spec and where it stands.

    `waiting_for` are the ranks whose push the round lacks, `left` those whose worker closed, `dead`
    those whose worker died, `members` the ranks that the coming round needs. `holder` is the token
    of who holds the shard, `busy` whether it reads or writes files. `replicated` is the last round
    that the standby has, None without one; `given_up` are ranks whose waiters are told
    `WorkerLost`. `here` are the ranks that a living worker holds, as far as this shard knows, with
    its incarnation and a token of its process; `highest_round` is the latest round that was ever
    decided, before the shards went back too. `saved` is the directory of checkpoints that the shard
    last wrote to or read from; `retired` whether others hold its ranges; `stepped` the last round
    that was a step from outside.
    """

    epoch: int
    round: int
    iterations: int
    skipped: int
    waiting_for: tuple[int, ...]
    left: tuple[int, ...]
    dead: tuple[int, ...]
    members: tuple[int, ...]
    lr: Rate
    spec: ShardSpec | None = None
    phase: str = ""
    holder: str | None = None
    busy: bool = False
    epoch_reason: str = ""
    schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()
    newest: dict[int, int] = field(default_factory=dict)
    changed: str | None = None
    replicated: int | None = None
    given_up: tuple[int, ...] = ()
    saved: str | None = None
    retired: bool = False
    live_owners: Owners = field(default_factory=dict)
    highest_round: int = 0
    stepped: int = 0
