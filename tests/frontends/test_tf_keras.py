"""A TensorFlow 2 script trains eagerly with our legacy optimizers as with tf_keras's own."""

import os
from typing import Any

import numpy as np
import pytest

from distnadam.errors import StructureError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")
tf_keras = pytest.importorskip("tf_keras")
ours = pytest.importorskip("distnadam.tf_keras")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
legacy = tf_keras.optimizers.legacy
RNG = np.random.default_rng(0)
START = [RNG.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (3,))]


def trained(optimizer: Any, steps: int = 10, *, sparse: bool = False) -> list[np.ndarray]:
    variables = [tf.Variable(array, name="w") for array in START]
    for _ in range(steps):
        with tf.GradientTape() as tape:
            rows = tf.gather(variables[0], [0, 2, 2]) if sparse else variables[0]
            loss = tf.reduce_sum(rows**2) + tf.reduce_sum(variables[1] ** 2)
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize(
    ("theirs", "mine", "given"),
    [
        ("Nadam", ours.DistNadam, {"schedule_decay": 0.02}),
        ("Nadam", ours.DistNadam, {"clipnorm": 0.1}),
        ("Adam", ours.DistAdam, {"clipvalue": 0.1}),
    ],
)
def test_steps_and_weights_are_those_of_the_legacy_optimizer(
    theirs: str, mine: Any, given: dict[str, Any]
) -> None:
    reference, optimizer = getattr(legacy, theirs)(0.01, **given), mine(0.01, num_shards=2, **given)
    for one, other in zip(trained(optimizer), trained(reference), strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-6, atol=5e-6)
    listed = optimizer.get_weights()
    for one, other in zip(listed, reference.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)
    again = mine(0.01, **given)
    with pytest.raises(StructureError, match="not known yet"):
        again.set_weights(listed)
    again.build([tf.Variable(array) for array in START])
    with pytest.raises(StructureError, match="expected"):
        again.set_weights(listed[:-1])
    again.set_weights(listed)
    for one, other in zip(again.get_weights(), listed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert mine.from_config(optimizer.get_config()).get_config() == optimizer.get_config()


def test_slices_count_as_the_dense_gradient_that_they_stand_for() -> None:
    rows = np.array([1.0, 0.0, 2.0, 0.0, 0.0], np.float32)[:, None]
    variables = [tf.Variable(array) for array in START]
    dense = ours.DistNadam(0.01)
    for _ in range(10):
        gradients = [2 * rows * variables[0].numpy(), 2 * variables[1].numpy()]
        dense.apply_gradients(zip(gradients, variables, strict=True))
    for one, other in zip(trained(ours.DistNadam(0.01), sparse=True), variables, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-6)


def test_a_model_is_trained_eagerly_and_a_graph_is_refused() -> None:
    x = RNG.standard_normal((64, 5)).astype(np.float32)
    made = tf_keras.Sequential([tf_keras.layers.Dense(4), tf_keras.layers.Dense(1)])
    made.compile(ours.DistNadamW(0.02), "mse", run_eagerly=True)
    losses = made.fit(x, x.sum(1), epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    made.compile(ours.DistNadam(0.02), "mse")
    with pytest.raises(Exception, match="run_eagerly=True"):
        made.fit(x, x.sum(1), verbose=0)


def test_an_unknown_variable_and_no_gradient_are_refused() -> None:
    optimizer, held = ours.DistNadam(), tf.Variable([1.0])
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply_gradients([(None, held)])
    optimizer.apply_gradients([(tf.constant([1.0]), held)])
    with pytest.raises(StructureError, match="not among the variables"):
        optimizer.apply_gradients([(tf.constant([1.0]), tf.Variable([1.0], name="other"))])
