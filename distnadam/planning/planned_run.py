"""A run as its plan sees it: how many parameters, on how many hosts, cut into how many shards."""

from dataclasses import dataclass

from distnadam.errors import ConfigError

FLOAT32_BYTES = 4
HALF_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A model, and how it is distributed.

    Hosts with workers come first. Without hosts of their own, shards lie on the workers' hosts in
    turn.

    Args:
        parameters: elements of the model, float32.
        hosts: hosts that have workers.
        workers_per_host: ranks on each of them.
        shards: shards in all; None: one for each host that has shards.
        shard_hosts: hosts for shards alone; 0: shards lie beside workers.
        replicas: standbys of each shard, 0 or 1.
        sum_group: ranks whose gradients are summed before they leave their host.
        half_gradients: whether gradients are float16 or bfloat16.
        half_parameters: whether workers get parameters in bfloat16 (`pull_dtype`).
        ema: whether the shards keep an average of the parameters.

    Raises:
        ConfigError: a count is below 1, or `sum_group` does not divide the ranks of a host.
    """

    parameters: int
    hosts: int = 1
    workers_per_host: int = 1
    shards: int | None = None
    shard_hosts: int = 0
    replicas: int = 0
    sum_group: int = 1
    half_gradients: bool = False
    half_parameters: bool = False
    ema: bool = False

    def __post_init__(self) -> None:
        least = {"shard_hosts": 0, "replicas": 0}
        for name in (
            *("parameters", "hosts", "workers_per_host", "shards"),
            *("shard_hosts", "replicas", "sum_group"),
        ):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise ConfigError(f"{name}: expected at least {least.get(name, 1)}, got {value}")
        if self.replicas > 1:
            raise ConfigError(f"replicas: expected 0 or 1, got {self.replicas}")
        if self.sum_group > 1 and self.workers_per_host % self.sum_group:
            raise ConfigError(
                f"sum_group: {self.sum_group} does not divide the {self.workers_per_host} workers "
                "of a host, so that a group would lie on two"
            )

    @property
    def workers(self) -> int:
        """Ranks in all."""
        return self.hosts * self.workers_per_host

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return self.shards or self.num_shard_hosts

    @property
    def num_shard_hosts(self) -> int:
        """Hosts that have shards, if there are enough shards."""
        return self.shard_hosts or self.hosts

    @property
    def shards_of_a_host(self) -> int:
        """The most shards that lie on one host."""
        return -(-self.num_shards // self.num_shard_hosts)

    @property
    def held(self) -> float:
        """The largest fraction of the parameters that one host's shards hold."""
        return self.shards_of_a_host / self.num_shards

    @property
    def sources(self) -> int:
        """Gradients that a shard averages: one for each group."""
        return -(-self.workers // self.sum_group)

    @property
    def pushes_of_a_host(self) -> int:
        """Gradients that leave a host that has workers."""
        return self.workers_per_host // self.sum_group

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an element of a gradient between hosts: sums are float32."""
        return HALF_BYTES if self.half_gradients and self.sum_group == 1 else FLOAT32_BYTES

    @property
    def parameter_bytes(self) -> int:
        """Bytes of an element of the parameters between hosts."""
        return HALF_BYTES if self.half_parameters else FLOAT32_BYTES
