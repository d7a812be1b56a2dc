"""TensorFlow's Keras Nadam as a sharded parameter server on Ray, or in this process.

Importing this package imports nothing else: each public name is imported at its first use, so that
a process that hosts a shard loads what a shard needs and no training loop. No name imports Ray or
a framework.

An optimizer has parameters once it is built, and steps from gradients that are averaged already:

>>> params = {"w": np.ones(3, np.float32)}
>>> optimizer = DistNadam(lr=0.1, backend="local").build(params)
>>> optimizer.apply_gradients({"w": np.ones(3, np.float32)})
1
>>> optimizer.iterations, optimizer.round, optimizer.skipped
(1, 1, 0)

Its state can be read, replaced, cut into other shards, and saved:

>>> optimizer.set_params(params)
>>> optimizer.set_weights(optimizer.get_weights())
>>> optimizer.get_params()["w"].tolist()
[1.0, 1.0, 1.0]
>>> optimizer.lr = 0.2
>>> optimizer.set_config(beta_2=0.99, clipnorm=1.0)
>>> optimizer.reshard(2)
>>> optimizer.save("checkpoints", data={"position": 7}).endswith("step_00000001")
True
>>> optimizer.reserve()
>>> in_background = optimizer.save("others", wait=False)
>>> optimizer.close()
>>> restored = DistNadam.restore("checkpoints", backend="local")
>>> restored.lr, restored.backend_name, restored.options.kernel, restored.restored_data
(0.2, 'local', 'auto', {'position': 7})

Gradients can be those of a loss. With several workers, each pushes its own for every round:

>>> loss = lambda params: (params["w"].sum(), {"w": np.ones(3, np.float32)})
>>> restored.get_gradients(loss, params)
[array([1., 1., 1.], dtype=float32)]
>>> restored.get_updates(loss, params).result()
2
>>> restored.waiting_for(), restored.lost_ranks()
((0,), {})
>>> group = restored.team(lambda rank: restored.worker(rank))
>>> group.call(0, "pull")
>>> [(rank, sorted(parameters)) for rank, parameters in group.results(60.0)]
[(0, ['w'])]
>>> group.close()
>>> restored.close()
>>> DistNadam.from_config(DistNadam(lr=0.3).get_config()).lr
0.3
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distnadam.config import Options
    from distnadam.groups import Group
    from distnadam.loss_scale import LossScale
    from distnadam.optimizer import DistNadam
    from distnadam.training.fit import fit
    from distnadam.training.task import Task
    from distnadam.variants import DistAdam, DistAdamW, DistNadamW
    from distnadam.worker import Worker

__all__ = [
    "DistAdam",
    "DistAdamW",
    "DistNadam",
    "DistNadamW",
    "Group",
    "LossScale",
    "Options",
    "Task",
    "Worker",
    "fit",
]

_HOMES = {
    "DistAdam": "distnadam.variants",
    "DistAdamW": "distnadam.variants",
    "DistNadamW": "distnadam.variants",
    "DistNadam": "distnadam.optimizer",
    "Group": "distnadam.groups",
    "LossScale": "distnadam.loss_scale",
    "Options": "distnadam.config",
    "Task": "distnadam.training.task",
    "Worker": "distnadam.worker",
    "fit": "distnadam.training.fit",
}
_MODULES = (
    *("callbacks", "checkpoint", "config", "errors", "groups", "hyperparameters", "interop"),
    *("jax", "keras", "loss_scale", "metrics", "optimizer", "schedules", "tf_keras", "torch"),
    *("training", "variants", "worker"),
)
"""Public modules that `import distnadam` makes available, each at its first use."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        return import_module(f"{__name__}.versions").installed_version(__name__) or "unknown"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, "__version__"})
