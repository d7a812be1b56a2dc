"""Steps on Ray that end before the framework has their round: the next one goes on rightly."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from distnadam import Worker
from distnadam.errors import Rewound, StepTimeout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # Keras's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
SHAPES = {"a": (5, 3), "b": (3,)}


def arrays(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]


class Jax:
    """A rank of a JAX script, which holds the parameters that the last step has returned."""

    def __init__(self, **arguments: Any) -> None:
        jax, ours = pytest.importorskip("jax"), pytest.importorskip("distnadam.jax")
        self.optimizer = ours.DistNadam(0.1, **arguments)
        self.held = [jax.numpy.array(array) for array in arrays(0)]

    def step(self, gradients: list[np.ndarray]) -> None:
        self.held = self.optimizer.step(self.held, gradients)

    def bits(self) -> list[bytes]:
        return [np.asarray(array).tobytes() for array in self.held]


class Keras:
    """A rank of a Keras script, whose variables are assigned."""

    def __init__(self, **arguments: Any) -> None:
        keras, ours = pytest.importorskip("keras"), pytest.importorskip("distnadam.keras")
        if "name" in arguments:
            arguments["cluster_name"] = arguments.pop("name")
        self.optimizer = ours.DistNadam(0.1, **arguments)
        pairs = zip(arrays(0), SHAPES, strict=True)
        self.variables = [keras.Variable(array, name=name) for array, name in pairs]
        self.optimizer.build(self.variables)
        self.convert = keras.ops.convert_to_tensor

    def step(self, gradients: list[np.ndarray]) -> None:
        self.optimizer.apply([self.convert(array) for array in gradients], self.variables)

    def bits(self) -> list[bytes]:
        keras = pytest.importorskip("keras")
        return [keras.ops.convert_to_numpy(v.value).tobytes() for v in self.variables]


class TfKeras:
    """A rank of a TensorFlow 2 script, whose variables are assigned."""

    def __init__(self, **arguments: Any) -> None:
        self.tf, ours = pytest.importorskip("tensorflow"), pytest.importorskip("distnadam.tf_keras")
        if "name" in arguments:
            arguments["cluster_name"] = arguments.pop("name")
        self.optimizer = ours.DistNadam(0.1, **arguments)
        self.variables = [self.tf.Variable(array) for array in arrays(0)]

    def step(self, gradients: list[np.ndarray]) -> None:
        pairs = zip(map(self.tf.constant, gradients), self.variables, strict=True)
        self.optimizer.apply_gradients(pairs)

    def bits(self) -> list[bytes]:
        return [variable.numpy().tobytes() for variable in self.variables]


KINDS = pytest.mark.parametrize("kind", [Jax, Keras, TfKeras])


def reference(kind: Callable[..., Any], gradients: list[list[np.ndarray]]) -> list[bytes]:
    """What one rank holds after steps by these gradients."""
    alone = kind(backend="local")
    for given in gradients:
        alone.step(given)
    alone.optimizer.close()
    bits: list[bytes] = alone.bits()
    return bits


def mean(turn: int) -> list[np.ndarray]:
    """The mean gradient of both ranks."""
    return [(a + b) / np.float32(2) for a, b in zip(arrays(turn), arrays(-turn % 99), strict=True)]


def interrupt_once_decided(patched: pytest.MonkeyPatch) -> None:
    """Have a Ctrl-C come once a step of rank 0 has its round, and before the framework has it."""
    whole = Worker.step

    def step(self: Worker, *given: Any, **others: Any) -> Any:
        stepped = whole(self, *given, **others)
        if self.rank == 0:
            signal.raise_signal(signal.SIGINT)
        return stepped

    patched.setattr(Worker, "step", step)


@KINDS
def test_what_a_cut_step_has_pushed_counts_once_and_the_next_one_goes_on(kind: Any) -> None:
    place = {"num_workers": 2, "num_shards": 2, "backend": "ray", "name": f"cut-{kind.__name__}"}
    one, other = (kind(rank=rank, **place) for rank in range(2))
    with ThreadPoolExecutor(1) as thread:
        for turn in range(1, 7):
            if turn == 3:  # others' gradients are awaited
                session = one.optimizer._replica._running()[1].session
                usual, session._timeout_s = session._timeout_s, 0.1
                with pytest.raises(StepTimeout):
                    one.step(arrays(turn))
                session._timeout_s = usual
                thread.submit(other.step, arrays(-turn % 99)).result(100)
                continue
            theirs = thread.submit(other.step, arrays(-turn % 99))
            if turn in (4, 5):  # the second one is of a step after one that was cut
                with pytest.MonkeyPatch.context() as patched:
                    interrupt_once_decided(patched)
                    with pytest.raises(KeyboardInterrupt):
                        one.step(arrays(turn))
            else:
                one.step(arrays(turn))
            theirs.result(100)
    assert one.bits() == other.bits() == reference(kind, [mean(turn) for turn in range(1, 7)])
    other.optimizer.close()
    one.optimizer.close()


@KINDS
def test_a_framework_goes_on_from_what_the_shards_went_back_to(kind: Any) -> None:
    one = kind(num_shards=2, backend="ray")
    for turn in range(1, 4):
        one.step(arrays(turn))
    os.kill(one.optimizer.cluster.shards.backend.addresses[0].pid, signal.SIGKILL)
    with pytest.raises(Rewound):
        one.step(arrays(9))
    if kind is not Jax:  # whose parameters the script holds
        assert one.bits() == [array.tobytes() for array in arrays(0)]
    for turn in range(4, 7):
        one.step(arrays(turn))
    assert one.bits() == reference(kind, [arrays(turn) for turn in range(4, 7)])
    one.optimizer.close()
