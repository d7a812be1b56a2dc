"""Every error that distnadam raises, in one tree.

    DistNadamError ├── ConfigError (ValueError)        an argument or option is out of its range ├──
    StructureError (ValueError)     a tensor's path, shape or dtype is not what was built ├──
    GradientError (ValueError) │   └── NonFiniteGradient           NaN, infinity, or a magnitude
    whose square overflows ├── LifecycleError                  used before build, after close, or
    twice ├── ProtocolError                   a message that the shards refuse │   ├── StaleEpoch
    from before the parameters were replaced │   │   ├── Rewound                 from before all
    shards went back to an earlier step │   │   └── Reconfigured            from before a shard or
    the membership changed; the round goes on │   ├── SupersededWorker            a newer worker
    holds this rank │   ├── LatePush                    its round is over and it was not counted │
    ├── RoundMismatch               its round has not come yet │   ├── IllegalMessage
    not legal in the shard's present phase │   └── PushesPending               a step from outside
    while workers have pushed ├── ClusterError                    what runs the shards cannot do
    what is asked │   ├── InsufficientResources       the cluster is too small for the ask │   ├──
    OutOfMemory (MemoryError)   a process cannot have the memory for a shard's state, or for a copy
    of it │   ├── Unrecoverable               processes died and the settings allow no recovery │
    ├── VersionMismatch             a node has another version of a package, or lacks it │   ├──
    NameTaken                   an optimizer of that name is running │   ├── NotRunning
    no optimizer of that name is running │   ├── ShardLost                   a shard's process died
    │   │   └── ShardUnavailable        a call to a shard failed; it may have been carried out or
    not │   ├── WorkerLost                  another rank's worker died, and nobody took it over in
    time │   ├── ShardsDisagree              two shards computed different scalars │   ├──
    StepTimeout                 waited too long for a shard or for other workers │   ├── ArenaError
    shared memory cannot be had (Ray objects are used instead) │   └── LaneError                   a
    shard cannot be reached by a socket (Ray objects are used instead) ├── ConversionError
    (ValueError)    another framework's Nadam cannot hold this state, or ours cannot hold its ├──
    TrainingError                   `fit` cannot go on; the task's own error is its cause ├──
    KernelError                     this thread's arithmetic is not IEEE (flushed denormals) └──
    CheckpointError                 a file was refused
        └── CheckpointBusy              another run writes there

This module knows nothing of the rest of the package. Every class can be made of one message, a
whole sentence or more, and pickles.
"""


class DistNadamError(Exception):
    """The base of every error that distnadam raises on purpose."""


class ConfigError(DistNadamError, ValueError):
    """An argument or option is out of its range; the message names it and its value."""


class StructureError(DistNadamError, ValueError):
    """A tree of tensors is not what was built; the message names the path, the expected and the
    given.
    """


class GradientError(DistNadamError, ValueError):
    """A gradient cannot be computed or used; the message names the parameter."""


class NonFiniteGradient(GradientError):
    """A gradient holds NaN, infinity or a magnitude whose square overflows; no shard has moved."""


class LifecycleError(DistNadamError, RuntimeError):
    """The optimizer or worker was used before `build`, after `close`, or built twice."""


class ProtocolError(DistNadamError):
    """A shard refused a message; nothing was changed by it."""


class StaleEpoch(ProtocolError):
    """The message is from before the state was replaced; pull and compute again.

    Args:
        message: a whole sentence.
        epoch: the shard's present epoch, -1 where the sender did not know.
        step: rounds decided where training goes on (batches follow it), -1 likewise.
    """

    def __init__(self, message: str, epoch: int = -1, step: int = -1) -> None:
        super().__init__(message)
        self.epoch, self.step = epoch, step


class Rewound(StaleEpoch):
    """All shards went back, after a death, to round `step`; compute again from there."""


class Reconfigured(StaleEpoch):
    """A shard was taken over, or the membership changed; the worker pushes the same gradients again
    by itself.
    """


class SupersededWorker(ProtocolError):
    """A newer worker has taken this rank over; this one must stop."""


class LatePush(ProtocolError):
    """The push is for a round that is over, and it was not counted."""


class RoundMismatch(ProtocolError):
    """The push is for a round that has not come yet."""


class IllegalMessage(ProtocolError):
    """The message is not legal in the shard's present phase."""


class PushesPending(ProtocolError):
    """A step from outside was asked for while workers' pushes wait for their round."""


class ClusterError(DistNadamError):
    """What runs the shards cannot do what was asked."""


class InsufficientResources(ClusterError):
    """The cluster lacks what the shards or workers ask; the message says how much of what."""


class OutOfMemory(ClusterError, MemoryError):
    """A process cannot have the memory for a shard's state, or for a copy of it; what runs goes on
    as it was.
    """


class Unrecoverable(ClusterError):
    """Processes died, and what is left or allowed does not suffice to go on with the same bits; the
    message says what would.
    """


class VersionMismatch(ClusterError):
    """A node has another version of a package than the driver, or lacks it."""


class NameTaken(ClusterError):
    """An optimizer of that name is already running on the cluster."""


class NotRunning(ClusterError):
    """No optimizer of that name is running on the cluster."""


class ShardLost(ClusterError):
    """A shard's process or node died."""


class ShardUnavailable(ShardLost):
    """A call to a shard failed on its way there or back: it may have been carried out or not, and
    the shard may well live.
    """


class WorkerLost(ClusterError):
    """Another rank's worker died and nobody took it over in time; the message names the rank, and
    this worker's push was dropped.
    """


class ShardsDisagree(ClusterError):
    """Two shards computed different scalars for one step: the learning-rate function is not a
    function of the step.
    """


class StepTimeout(ClusterError, TimeoutError):
    """A shard, or the other workers, did not answer in time; the message names them."""


class ArenaError(ClusterError):
    """Shared memory of this size cannot be had."""


class LaneError(ClusterError):
    """A shard of this machine cannot be reached through its socket, or what came through it is no
    message.
    """


class ConversionError(DistNadamError, ValueError):
    """Another framework's Nadam differs from ours in what this state needs; the message names each
    difference.
    """


class TrainingError(DistNadamError):
    """`fit` cannot go on; the cause is chained."""


class KernelError(DistNadamError):
    """This thread's arithmetic would give other bits than every other's."""


class CheckpointError(DistNadamError):
    """A checkpoint or one of its files was refused; the message names the file and the reason."""


class CheckpointBusy(CheckpointError):
    """Another run holds this checkpoint directory."""
