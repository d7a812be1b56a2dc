"""Keras 3's own tests of its optimizers, from the installed wheel, run with ours in place."""

import importlib.util
import io
import os
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
keras = pytest.importorskip("keras")
ours = pytest.importorskip("distnadam.keras")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # as they are run by Keras

SGD = "checks the numbers of SGD's step, which we have not"
AMSGRAD = "amsgrad is refused"
PRIVATE = "looks at private variables of Keras's class, which are on the shards"
SUITES: dict[str, dict[str, str]] = {
    "nadam_test": {"test_build_with_empty_var_list": PRIVATE},
    "adam_test": {
        "test_config": AMSGRAD,
        "test_correctness_with_golden": AMSGRAD,
        "test_ema": PRIVATE,
        "test_ema_overwrite_frequency": PRIVATE,
        "test_clipnorm_indexed_slices": "needs TensorFlow as Keras's backend",
    },
    "adamw_test": {
        "test_config": AMSGRAD,
        "test_correctness_with_golden": AMSGRAD,
        "test_weight_decay_is_none": "compares the words of the error",
    },
    "optimizer_test": {
        "test_empty_gradients": SGD,
        "test_ema": SGD,
        "test_ema_with_model_fit": SGD,
        "test_static_loss_scaling": SGD,
        "test_gradient_accumulation": SGD,
        "test_callable_learning_rate": SGD,
        "test_overwrite_with_gradient": SGD,
        "test_overwrite_with_gradient_with_gradient_accumulation": SGD,
        "test_get_method": "looks Keras's own classes up by their names",
        "test_optimizer_auto_naming": "expects the names of Keras's own classes",
        "test_tf_checkpointing": "needs TensorFlow as Keras's backend",
        "test_mixed_with_tf_variables": "needs TensorFlow as Keras's backend",
    },
}
"""Each file, and which of its tests say nothing of ours, and why; what they check otherwise is
among the cases of `test_keras`.
"""
CLASSES = {"Nadam": ours.DistNadam, "Adam": ours.DistAdam, "AdamW": ours.DistAdamW}


def place_of(suite: str) -> Path:
    package = Path(str(keras.__file__)).parent
    return package / "src" / "optimizers" / f"{suite}.py"


def with_ours(suite: str) -> ModuleType:
    """Import a file of tests, and put our classes where it has Keras's; SGD is Nadam then."""
    name = f"theirs_{suite}"
    spec = importlib.util.spec_from_file_location(name, place_of(suite))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    replaced = [kind for kind in CLASSES if hasattr(module, kind)]
    for kind in replaced:
        setattr(module, kind, CLASSES[kind])
    if hasattr(module, "optimizers"):
        others = {**vars(module.optimizers), **CLASSES, "SGD": ours.DistNadam, "get": get}
        module.optimizers = SimpleNamespace(**others)
        replaced.append("optimizers")
    assert replaced
    return module


def get(named: Any) -> Any:
    """Make one of our classes by the name of Keras's; others are Keras's."""
    name, config = (
        (named["class_name"], named["config"]) if isinstance(named, dict) else (named, {})
    )
    kind = {kind.lower(): ours_kind for kind, ours_kind in CLASSES.items()}.get(name)
    return keras.optimizers.get(named) if kind is None else kind(**config)


def cases(suite: unittest.TestSuite) -> Iterator[Any]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


def name_of(test: Any) -> str:
    return str(test.id().split()[0].rpartition(".")[2]).rstrip("0123456789")


@pytest.mark.parametrize("suite", SUITES)
def test_a_public_suite_of_keras_passes_with_our_classes(
    suite: str, pytestconfig: pytest.Config
) -> None:
    pytestconfig.addinivalue_line("markers", "requires_trainable_backend: of Keras's tests")
    if not place_of(suite).is_file():
        pytest.skip(f"keras {keras.__version__} ships no {suite}.py in its wheel")
    found = list(cases(unittest.defaultTestLoader.loadTestsFromModule(with_ours(suite))))
    left_out = SUITES[suite]
    chosen = [t for t in found if name_of(t) not in left_out and t.id()[-12:] != "test_session"]
    assert len(chosen) >= 3, [test.id() for test in found]
    output = io.StringIO()
    result = unittest.TextTestRunner(output, verbosity=2).run(unittest.TestSuite(chosen))
    assert result.wasSuccessful(), output.getvalue()
    assert result.testsRun == len(chosen)
