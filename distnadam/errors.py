"""Every error that distnadam raises, in one tree:

    DistNadamError
    ├── ConfigError (ValueError)          an argument or option is out of its range
    │   └── NoSuchSetting (AttributeError) an attribute was set that is no setting, or is fixed
    ├── StructureError (ValueError)       a tensor's path, shape or dtype is not what was built
    ├── GradientError (ValueError)        a gradient cannot be computed or used
    │   └── NonFiniteGradient             NaN, infinity, or a magnitude whose square overflows
    ├── LifecycleError (RuntimeError)     used before build, after close, or built twice
    │   └── NotOpen (AttributeError)      it is not built yet, or closed
    ├── ProtocolError                     a shard refused a message
    │   ├── StaleEpoch                    it is from before the parameters were replaced
    │   │   ├── Rewound                   all shards have gone back to an earlier round
    │   │   └── Reconfigured              a shard or the membership has changed; the round goes on
    │   │       └── GroupChanged          another rank of a push's group has changed; push again
    │   ├── SupersededWorker              a newer worker holds this rank
    │   ├── LatePush                      its round is over and did not count it
    │   ├── RoundMismatch                 its round has not begun
    │   ├── IllegalMessage                it is not legal in the shard's present phase
    │   ├── RanksDisagree                 ranks pushed a round with different settings
    │   └── PushesPending                 a direct step while workers' pushes are pending
    ├── ClusterError                      the processes or nodes cannot do what is asked
    │   ├── InsufficientResources         the cluster lacks CPUs, memory or labels
    │   ├── OutOfMemory (MemoryError)     a process lacks memory for a shard's state or a copy of it
    │   ├── Unrecoverable                 processes died and the settings allow no recovery
    │   ├── VersionMismatch               a node has another version of a package, or lacks it
    │   ├── NameTaken                     an optimizer of that name is running
    │   ├── NotRunning                    no optimizer of that name is running
    │   ├── RayLost                       Ray itself died, with all that ran on it
    │   ├── ShardLost                     a shard's process or node died
    │   │   └── ShardUnavailable          a call failed, and may have been carried out
    │   ├── WorkerLost                    another rank's worker died and was not replaced in time
    │   ├── ShardsDisagree                two shards computed different scalars for one step
    │   ├── StepTimeout (TimeoutError)    a shard or other workers did not answer in time
    │   ├── ArenaError                    shared memory is not available
    │   └── LaneError                     a shard's socket cannot be reached
    ├── ConversionError (ValueError)      another framework's Nadam cannot continue from this state
    ├── TrainingError                     `fit` cannot go on
    ├── KernelError                       the step cannot be computed here
    └── CheckpointError                   a checkpoint or one of its files was refused
        └── CheckpointBusy                another run or save writes there

Each class takes one message, made of whole sentences, and survives pickling. This module knows
nothing of the rest of the package.
"""


class DistNadamError(Exception):
    """The base of every error that distnadam raises on purpose."""


class ConfigError(DistNadamError, ValueError):
    """An argument or option is out of its range.

    Raised where it is passed, before anything is started; the message names it and its value.
    """


class NoSuchSetting(ConfigError, AttributeError):
    """An attribute was assigned that would have no effect; the message says what would."""


class StructureError(DistNadamError, ValueError):
    """A tree of tensors is not what was built.

    Raised before anything is sent; the message names the tensor's path, what was expected and what
    was given.
    """


class GradientError(DistNadamError, ValueError):
    """A gradient cannot be computed or used; the message names the parameter."""


class NonFiniteGradient(GradientError):
    """A gradient holds NaN, infinity, or a magnitude whose square overflows its dtype.

    Raised to every worker of the round, which no shard has applied, unless
    ``on_nonfinite="skip"``.
    """


class LifecycleError(DistNadamError, RuntimeError):
    """The optimizer or worker was used before `build` or after `close`, or was built twice."""


class NotOpen(LifecycleError, AttributeError):
    """The optimizer or worker is not built yet, or was closed.

    An AttributeError, so that it can be inspected: a closed one has no `round` any more.
    """


class ProtocolError(DistNadamError):
    """A shard refused a message, which changed nothing."""


class StaleEpoch(ProtocolError):
    """The message is from before the state was replaced: pull, and compute the gradient again.

    Raised after `set_params`, `set_weights`, a rewind or a change of the shards.

    Args:
        message: a whole sentence.
        epoch: the shard's present epoch; -1 if the sender does not know it.
        step: despite its name the protocol round at which training goes on, and which batches
            follow; it counts skipped rounds too. -1 if the sender does not know it.
    """

    def __init__(self, message: str, epoch: int = -1, step: int = -1) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


class Rewound(StaleEpoch):
    """All shards went back to round `step` after a death: compute again from there."""


class Reconfigured(StaleEpoch):
    """A shard was taken over, or the membership changed, and the round goes on.

    The worker handles it by itself: it pushes the same gradients again.
    """


class GroupChanged(Reconfigured):
    """A push was part of a group's sum, and another rank of the group has changed since.

    Whoever has summed the group sends its pushes singly; a worker pushes the same gradients again.
    """


class SupersededWorker(ProtocolError):
    """A newer worker holds this rank; this one must stop."""


class LatePush(ProtocolError):
    """The push's round is over, and the push was not counted in it."""


class RoundMismatch(ProtocolError):
    """The push's round has not begun; the message gives the expected round."""


class IllegalMessage(ProtocolError):
    """The message is not legal in the shard's present phase, or while others act on it."""


class RanksDisagree(ProtocolError):
    """Ranks pushed for one round what must be equal on all, such as the count of micro-batches, and
    it differs.

    Raised to every worker of the round, with the same message, which names each rank's; no shard
    has applied it, and the next round may be pushed.
    """


class PushesPending(ProtocolError):
    """`apply_gradients` was called while workers' pushes wait for their round."""


class ClusterError(DistNadamError):
    """The processes or nodes that run the optimizer cannot do what is asked."""


class InsufficientResources(ClusterError):
    """The cluster lacks what shards or workers ask for; the message gives how much of what."""


class OutOfMemory(ClusterError, MemoryError):
    """A process lacks the memory for a shard's state or a copy of it; running shards go on."""


class Unrecoverable(ClusterError):
    """Processes died, and what is left cannot go on with the same bits.

    The message names the setting that would have allowed a recovery.
    """


class VersionMismatch(ClusterError):
    """A node has another version of a package than the driver, or lacks it."""


class NameTaken(ClusterError):
    """An optimizer of that name is already running on the cluster."""


class NotRunning(ClusterError):
    """No optimizer of that name is running on the cluster."""


class RayLost(ClusterError):
    """Ray itself died: its head, or its raylet on this host, and all that ran on it with it.

    No other call on what ran there succeeds. Restore from a checkpoint, in a new process.

    Args:
        message: a whole sentence.
        checkpoint_dir: where the run of `fit` that it ended has its checkpoints; None elsewhere.
        step: the newest of these; -1 if there is none.
    """

    def __init__(self, message: str, checkpoint_dir: str | None = None, step: int = -1) -> None:
        super().__init__(message)
        self.checkpoint_dir = checkpoint_dir
        self.step = step


class ShardLost(ClusterError):
    """A shard's process or node died."""


class ShardUnavailable(ShardLost):
    """A call to a shard failed on its way there or back.

    It may have been carried out or not, and the shard may be alive.
    """


class WorkerLost(ClusterError):
    """Another rank's worker died and no new one joined in time; the message names the rank.

    The push of the worker that receives this error was dropped.
    """


class ShardsDisagree(ClusterError):
    """Two shards computed different scalars for one step.

    The learning-rate function does not depend on the step alone.
    """


class StepTimeout(ClusterError, TimeoutError):
    """A shard or the other workers did not answer in time; the message names them."""


class ArenaError(ClusterError):
    """Shared memory of the needed size is not available; Ray objects are used instead."""


class LaneError(ClusterError):
    """A process cannot be reached by a socket, of this host or by TCP, or sent what is no message.

    Between workers and shards Ray objects are used instead.
    """


class ConversionError(DistNadamError, ValueError):
    """Another framework's Nadam would continue differently from this state, or ours from its.

    The message names each difference; nothing was written.
    """


class TrainingError(DistNadamError):
    """`fit` cannot go on: the task failed, or recoveries brought no new step.

    The message names the rank and the step; the error of the task's code is the cause or a note.
    """


class KernelError(DistNadamError):
    """The step cannot be computed here, or would have other bits than everywhere else.

    This thread flushes denormals, or the fused kernel that was asked for cannot be compiled.
    """


class CheckpointError(DistNadamError):
    """A checkpoint or one of its files was refused; the message names the file and the reason."""


class CheckpointBusy(CheckpointError):
    """Another run, or another save, writes to this directory."""
