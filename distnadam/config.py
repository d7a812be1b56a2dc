"""The configuration of an optimizer beside its hyper-parameters: the options of its runtime, its
topology, and all settings together.

They are frozen, validated when they are constructed, and become plain data for a checkpoint. No
I/O and no arrays here.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import override

from distnadam.checks import (
    check_as,
    check_count,
    check_name,
    check_ports,
    check_processes,
    fields_of,
    set_number,
)
from distnadam.errors import ConfigError
from distnadam.hyperparameters import DEFAULT_EPSILON, NadamConfig
from distnadam.places import place, shown
from distnadam.schedules import Schedule, rate_from, rate_to_dict

BackendName = Literal["auto", "local", "ray"]
"""Where shards run: in this process, on Ray, or where it suits."""


@dataclass(frozen=True)
class Options:
    """Rarely changed settings of the runtime; the defaults suit most runs.

    Args:
        on_nonfinite: "raise" refuses a round with a non-finite gradient and raises
            `NonFiniteGradient` at every worker; "skip" leaves the parameters as they are, counts
            the round as skipped and continues. A rank's `found_inf` skips the round with either.
        check_gradients: check every gradient for finiteness before it is pushed, as `on_nonfinite`
            needs. False saves one read of it and lets NaN and infinity into parameters and moments.
        transport: "auto" moves gradients and parameters through shared memory between processes of
            one machine, by TCP between machines, and by Ray objects where neither works; "objects"
            always uses Ray objects.
        port_range: the first and the last TCP port at which shards listen for the relays of other
            hosts, and standbys for their primaries there, one port each. None means any port.
        kernel: "auto" steps with the compiled loop if llvmlite is installed (the extra `fused`),
            else with NumPy; "fused" and "numpy" require one of them. The bits are the same.
        threads: threads that step one shard. None means every CPU of this process in local mode,
            and on Ray the whole CPUs of `shard_cpus`, at least 1.
        shard_cpus: CPUs that each shard's actor requests of Ray; with 0 any number of shards starts
            on any machine.
        shard_memory_bytes: memory that each shard's actor requests of Ray, in bytes; 0 requests
            none.
        shard_resources: further Ray resources that each shard's actor requests, by name.
        worker_cpus: CPUs that each of `fit`'s worker actors requests of Ray. As many threads, at
            least 1, compute in NumPy and torch, in local mode too.
        worker_gpus: GPUs that each requests, and then sees alone; with 0.5, two share one.
        label_selector: Ray node labels required of the nodes of shards, standbys and supervisor.
        worker_label_selector: Ray node labels required of the nodes of `fit`'s workers.
        spread: spread shards over the nodes as evenly as their resources allow; False fills one
            node first.
        start_timeout_s: seconds to wait, with a message, for resources that the cluster does not
            have yet. None refuses at once what its nodes cannot provide, and waits 120 s for what
            they can.
        step_timeout_s: seconds that a worker waits for a round to be applied before it raises
            `StepTimeout`, naming the ranks or shards that are late.
        object_store_bytes: of a Ray that this package starts. None means Ray's default.
        checkpoint_dir: the directory, a path or an fsspec URL, from which the shards restore when
            one of them dies without a standby; `build` writes a first checkpoint there. None means
            wherever `save` wrote. Only what this optimizer saved or was restored from counts. A
            relative path is made absolute here; a URL's password or token is in no checkpoint.
        outlives: whether an optimizer that has a name outlives the process that made it; False
            ends it with that process, however that ends.
        retain_initial: keep the parameters given to `build` in the supervisor until the first
            checkpoint (4 bytes per float32 element), to recover a shard that dies before.
        min_workers: continue without workers that have been gone for longer than
            `rejoin_timeout_s`, as long as this many remain. None requires all workers.
        rejoin_timeout_s: seconds in which a new worker may take over a dead worker's rank, before
            the rank leaves (`min_workers`) or the waiting workers get `WorkerLost`.
        shard_timeout_s: seconds without a sign of life after which a shard counts as dead and is
            replaced.
        metrics: "auto" exports `distnadam.metrics` if Ray's own metrics are on, which takes the
            extra `metrics`; True requires it, False measures nothing.

    Raises:
        ConfigError: a value is out of its range.

    >>> DistNadam(options=Options(on_nonfinite="skip", step_timeout_s=60)).options.step_timeout_s
    60.0
    """

    on_nonfinite: Literal["raise", "skip"] = "raise"
    check_gradients: bool = True
    transport: Literal["auto", "objects"] = "auto"
    port_range: tuple[int, int] | None = None
    kernel: Literal["auto", "numpy", "fused"] = "auto"
    threads: int | None = None
    shard_cpus: float = 0.0
    shard_memory_bytes: int = 0
    shard_resources: Mapping[str, float] = field(default_factory=dict)
    worker_cpus: float = 0.0
    worker_gpus: float = 0.0
    label_selector: Mapping[str, str] = field(default_factory=dict)
    worker_label_selector: Mapping[str, str] = field(default_factory=dict)
    spread: bool = True
    start_timeout_s: float | None = None
    step_timeout_s: float = 300.0
    object_store_bytes: int | None = None
    checkpoint_dir: str | None = None
    outlives: bool = True
    retain_initial: bool = True
    min_workers: int | None = None
    rejoin_timeout_s: float = 30.0
    shard_timeout_s: float = 30.0
    metrics: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.checkpoint_dir is not None:
            object.__setattr__(self, "checkpoint_dir", place(self.checkpoint_dir, "checkpoint_dir"))
        self._check_numbers()
        if self.port_range is not None:
            object.__setattr__(self, "port_range", check_ports(self.port_range))
        kinds = {"shard_resources": float, "label_selector": str, "worker_label_selector": str}
        for name, kind in kinds.items():
            mapping = getattr(self, name)
            if not isinstance(mapping, Mapping):
                raise ConfigError(f"{name} must be a mapping, got {mapping!r}")
            object.__setattr__(
                self,
                name,
                {
                    str(key): check_as(kind, f"{name}[{key!r}]", value)
                    for key, value in mapping.items()
                },
            )

    def _check_numbers(self) -> None:
        least = {"threads": 1, "shard_memory_bytes": 0, "object_store_bytes": 1, "min_workers": 1}
        for name, at_least in least.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_count(name, value, least=at_least))
        for name in (
            "shard_cpus",
            "worker_cpus",
            "worker_gpus",
            "step_timeout_s",
            "start_timeout_s",
            "rejoin_timeout_s",
            "shard_timeout_s",
        ):
            if getattr(self, name) is not None:
                set_number(self, name)
        if self.worker_gpus > 1 and self.worker_gpus % 1:
            raise ConfigError(f"worker_gpus above 1 must be whole, got {self.worker_gpus!r}")

    @override
    def __repr__(self) -> str:
        fields = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"Options({shown(', '.join(fields))})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `of`."""
        return fields_of(self)

    @classmethod
    def of(cls, options: "Options | Mapping[str, Any] | None") -> "Options":
        """Return options unchanged, those of `to_dict`'s plain data, or for None the defaults.

        Raises:
            ConfigError: naming an option that does not exist, or a value out of its range.
        """
        if options is None:
            return cls()
        if isinstance(options, Options):
            return options
        if not isinstance(options, Mapping):
            raise ConfigError(f"options must be Options, got {options!r}")
        unknown = sorted(map(str, options.keys() - {f.name for f in dataclasses.fields(cls)}))
        if unknown:
            raise ConfigError(f"options: there is no option {unknown[0]!r}")
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How many processes an optimizer has, and where: all that its bits do not depend on.

    Args:
        num_shards: shards that the state is cut into, at least 1.
        num_workers: ranks whose gradients are averaged, at least 1.
        replicas: standbys per shard, 0 or 1.
        backend: "auto", "local" or "ray", as it was asked for.
        name: the name that others find it by, or None; "" is None.
    """

    num_shards: int = 1
    num_workers: int = 1
    replicas: int = 0
    backend: BackendName = "auto"
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_shards", "num_workers"):
            object.__setattr__(self, name, check_processes(name, getattr(self, name)))
        replicas = check_count("replicas", self.replicas, least=0, most=1)
        object.__setattr__(self, "replicas", replicas)
        if self.backend not in ("auto", "local", "ray"):
            raise ConfigError(f'backend must be "auto", "local" or "ray", got {self.backend!r}')
        object.__setattr__(self, "name", check_name(self.name) if self.name else None)

    @property
    def several(self) -> bool:
        """Whether there is more than one shard or worker."""
        return self.num_shards > 1 or self.num_workers > 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the constructor's arguments."""
        return fields_of(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that one optimizer is asked to be.

    `run` is what `fit` keeps in every checkpoint of its run, whoever saves it; {} outside of `fit`.
    """

    config: NadamConfig = field(default_factory=NadamConfig)
    options: Options = field(default_factory=Options)
    topology: Topology = field(default_factory=Topology)
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least, workers = self.options.min_workers, self.topology.num_workers
        if least is not None and least > workers:
            raise ConfigError(f"min_workers must be at most num_workers={workers}, got {least}")
        if self.config.loss_scale is not None and not self.options.check_gradients:
            raise ConfigError(
                "loss_scale needs Options(check_gradients=True): it follows whether gradients are "
                "finite"
            )

    @classmethod
    def of(cls, *, options: Options | Mapping[str, Any] | None, **arguments: Any) -> "Settings":
        """Return the settings of an optimizer's keyword arguments.

        Raises:
            TypeError: there is no such argument.
            ConfigError: naming the argument and its value.
        """
        named = {f.name for f in dataclasses.fields(Topology)}
        topology = {k: v for k, v in arguments.items() if k in named}
        config = {k: v for k, v in arguments.items() if k not in named}
        unknown = config.keys() - {f.name for f in dataclasses.fields(NadamConfig)}
        if unknown:
            name = min(unknown)
            hint = _HINTS.get(name, "")
            raise TypeError(f"DistNadam got an unexpected keyword argument {name!r}{hint}")
        config["lr"] = rate_from(config["lr"])
        if config["epsilon"] is None:
            config["epsilon"] = DEFAULT_EPSILON
        return cls(
            config=NadamConfig(**config),
            options=Options.of(options),
            topology=Topology(**topology),
        )

    def with_config(self, config: NadamConfig) -> "Settings":
        """Return these settings with other hyper-parameters."""
        return dataclasses.replace(self, config=config)

    def with_run(self, run: Mapping[str, Any]) -> "Settings":
        """Return these settings for a run of `fit`."""
        return dataclasses.replace(self, run=run)

    def with_shards(self, num_shards: int) -> "Settings":
        """Return these settings with another number of shards."""
        topology = dataclasses.replace(self.topology, num_shards=num_shards)
        return dataclasses.replace(self, topology=topology)

    def to_arguments(self) -> dict[str, Any]:
        """Return the optimizer's keyword arguments, clips that are None left out."""
        config = {k: v for k, v in fields_of(self.config).items() if v is not None}
        return config | self.topology.to_dict() | {"options": self.options}

    def to_config(self) -> dict[str, Any]:
        """Return `to_arguments` as plain data, but for a rate that is a plain function."""
        lr = self.config.lr
        plain = lr if callable(lr) and not isinstance(lr, Schedule) else rate_to_dict(lr)
        groups = [group.to_dict() for group in self.config.groups]
        scale = self.config.loss_scale
        return self.to_arguments() | {
            "lr": plain,
            "groups": groups,
            **({} if scale is None else {"loss_scale": scale.to_dict()}),
            "options": self.options.to_dict(),
        }


CHANGEABLE = (
    "lr",
    "beta_1",
    "beta_2",
    "epsilon",
    "schedule_decay",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "ema_momentum",
    "groups",
)
"""The hyper-parameters that may change between two steps."""


def changed_config(config: NadamConfig, values: Mapping[str, Any]) -> NadamConfig:
    """Return hyper-parameters with other values of those that may change between two steps.

    Raises:
        ConfigError: naming the setting and its value, and why it cannot be that, or cannot change.

    >>> changed_config(NadamConfig(), {"maximize": True})
    Traceback (most recent call last):
    distnadam.errors.ConfigError: maximize=True cannot be changed: it is part of the formula
    """
    for name in sorted(values.keys() - set(CHANGEABLE)):
        raise ConfigError(f"{name}={values[name]!r} cannot be changed: {_why_fixed(name)}")
    changes = dict(values)
    if "lr" in changes:
        changes["lr"] = rate_from(changes["lr"])
    if "epsilon" in changes and changes["epsilon"] is None:
        changes["epsilon"] = DEFAULT_EPSILON
    changed = dataclasses.replace(config, **changes)
    before, after = (
        [(group.pattern, group.trainable) for group in each.groups] for each in (config, changed)
    )
    if before != after:
        raise ConfigError(
            f"groups: only values can be changed, not which tensors they are of or whether they "
            f"are trainable: expected {_shown(before)}, got {_shown(after)}"
        )
    return changed


def _why_fixed(name: str) -> str:
    if name in _FIXED:
        return _FIXED[name]
    if name == "options" or name in {f.name for f in dataclasses.fields(Options)}:
        return "options are given when the optimizer is made or restored"
    hint = _HINTS.get(name, "")
    return f"there is no such setting{hint}; those that can be are {', '.join(CHANGEABLE)}"


def _shown(groups: Iterable[tuple[str, bool]]) -> str:
    words = [f"{name!r}{'' if trainable else ' (frozen)'}" for name, trainable in groups]
    return ", ".join(words) or "none"


_FIXED = {
    "formula": "the moments and their clock were computed by it",
    "maximize": "it is part of the formula",
    "decoupled_weight_decay": "it is part of the formula",
    "sum_group": "workers and relays sum by it",
    "pull_dtype": "shards keep masters, and workers memory, by it",
    "loss_scale": "its scale follows from the rounds so far",
    "use_ema": "shards keep the average's memory by it",
    "ema_overwrite_frequency": "it is counted from the first step",
    "clocks": "the tensors' steps were counted by it",
    "num_shards": "reshard(num_shards) cuts the state anew",
    "num_workers": "the ranks are given when the optimizer is made or restored",
    "replicas": "standbys are asked for when the optimizer is made or restored",
    "backend": "it is where the shards run; save, and restore elsewhere",
    "name": "others find the optimizer by it",
}
"""Why the other settings stay as they are."""
_HINTS = {
    "learning_rate": "; did you mean lr?",
    "amsgrad": ": the largest second moment so far would be another slot",
    "eps_root": ": no epsilon is added under the root; see epsilon",
    "mu_dtype": ": moments have the dtype of their parameters' masters",
}
"""What is said of arguments that other frameworks have."""
_CHOICES: dict[str, tuple[object, ...]] = {
    "on_nonfinite": ("raise", "skip"),
    "check_gradients": (True, False),
    "spread": (True, False),
    "outlives": (True, False),
    "retain_initial": (True, False),
    "transport": ("auto", "objects"),
    "kernel": ("auto", "numpy", "fused"),
    "metrics": ("auto", True, False),
}
