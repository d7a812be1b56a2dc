"""Keras 3 trains with our optimizers as with its own: on the backend that KERAS_BACKEND names, JAX
unless told otherwise; and the same cases on torch, in a process of its own.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, LossScale, Options
from distnadam.errors import ConfigError, StructureError

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
keras = pytest.importorskip("keras")
ours = pytest.importorskip("distnadam.keras")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # Keras's own
]
BACKEND = os.environ["KERAS_BACKEND"]
costly_on_jax = pytest.mark.nightly if BACKEND == "jax" else pytest.mark.slow
"""Of what compiles much and differs little from torch, where it is always run."""
RNG = np.random.default_rng(0)
X = RNG.standard_normal((128, 8)).astype(np.float32)
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0)


def model(optimizer: Any, **how: Any) -> Any:
    keras.utils.set_random_seed(0)
    made = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], **how)
    return made


def trained(optimizer: Any, epochs: int = 2, **how: Any) -> Any:
    made = model(optimizer, **how)
    fit(made, epochs)
    return made


def narrow(optimizer: Any) -> Any:
    made = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(optimizer=optimizer, loss=loss)
    return made


def fit(made: Any, epochs: int = 1, **others: Any) -> Any:
    keras.utils.set_random_seed(1)
    return made.fit(X, Y, epochs=epochs, batch_size=32, verbose=0, shuffle=False, **others)


def gap(one: Any, other: Any) -> float:
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def applied(optimizer: Any, steps: int = 7, *, jitted: bool = False) -> list[np.ndarray]:
    """Return variables after some steps by gradients that depend on them."""
    rng = np.random.default_rng(3)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in [(4, 3), (3,), ()]]
    held = [keras.Variable(array, name=name) for array, name in zip(start, "abc", strict=True)]
    optimizer.build(held)
    apply = optimizer.stateless_apply
    if jitted:
        import jax

        apply = jax.jit(apply)
    values, state = [v.value for v in held], [v.value for v in optimizer.variables]
    for step in range(steps):
        gradients = [value**2 * (0.1 + step) for value in values]
        if jitted:
            values, state = apply(state, gradients, values)
        else:
            optimizer.apply_gradients(zip(gradients, held, strict=True))
            values = [v.value for v in held]
    if jitted:
        for variable, value in zip([*held, *optimizer.variables], [*values, *state], strict=True):
            variable.assign(value)
    optimizer.finalize_variable_values(held)
    return [keras.ops.convert_to_numpy(v.value) for v in held]


@pytest.mark.parametrize("jitted", [False, True][: 1 + (BACKEND == "jax")])
@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1, "clipnorm": 0.1},
        {"global_clipnorm": 0.1, "loss_scale_factor": 4.0},
        {"gradient_accumulation_steps": 2, "clipvalue": 0.01, "weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_steps_are_those_of_keras_own_optimizer(settings: dict[str, Any], jitted: bool) -> None:
    theirs = applied(keras.optimizers.Nadam(learning_rate=0.1, **settings))
    optimizer = ours.DistNadam(learning_rate=0.1, num_shards=2, backend="local", **settings)
    for mine, expected in zip(applied(optimizer, jitted=jitted), theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
    optimizer.close()


def test_a_model_trains_as_with_keras_own_optimizer() -> None:
    settings = {"learning_rate": 0.01, "gradient_accumulation_steps": 2}
    theirs = trained(keras.optimizers.Nadam(**settings))
    mine = trained(ours.DistNadam(num_shards=2, backend="local", **settings))
    assert gap(theirs, mine) < 1e-5
    assert gap(mine, model("adam")) > 1e-3


def test_every_class_has_keras_defaults_and_its_order_of_arguments() -> None:
    variable = np.ones(5, np.float32)
    gradient = keras.ops.convert_to_tensor(np.arange(5, dtype=np.float32))

    def stepped(optimizer: Any) -> Any:
        held = keras.Variable(variable)
        for _ in range(3):
            optimizer.apply_gradients([(gradient, held)])
        return keras.ops.convert_to_numpy(held.value)

    for mine, theirs in (
        (ours.DistNadam(), keras.optimizers.Nadam()),
        (ours.DistAdam(0.01, 0.8, 0.9, 1e-5), keras.optimizers.Adam(0.01, 0.8, 0.9, 1e-5)),
        (ours.DistAdamW(0.01, 0.1), keras.optimizers.AdamW(0.01, 0.1)),
        (ours.DistNadamW(), keras.optimizers.Nadam(weight_decay=0.004)),
    ):
        np.testing.assert_allclose(stepped(mine), stepped(theirs), rtol=1e-6)
    with pytest.raises(ConfigError, match="amsgrad"):
        ours.DistAdam(amsgrad=True)
    for kind in (ours.DistAdamW, ours.DistNadamW):
        with pytest.raises(ConfigError, match="weight_decay must be a float"):
            kind(weight_decay=None)


@costly_on_jax
def test_a_schedule_a_changed_rate_and_excluded_variables_act_as_in_keras() -> None:
    def run(kind: Any, rate: Any) -> list[np.ndarray]:
        optimizer = kind(learning_rate=rate, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["b"])
        return applied(optimizer)

    def changed(kind: Any) -> Any:
        made = trained(kind(learning_rate=0.01), 1)
        made.optimizer.learning_rate = 0.1
        fit(made)
        return made

    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.5)
    for rate in (schedule, lambda: 0.03):
        pairs = zip(run(ours.DistNadam, rate), run(keras.optimizers.Nadam, rate), strict=True)
        for mine, theirs in pairs:
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert gap(changed(keras.optimizers.Nadam), changed(ours.DistNadam)) < 1e-5


@costly_on_jax
def test_a_keras_file_holds_the_moments_and_keras_own_class_takes_them(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.01, "use_ema": True}
    one = trained(ours.DistNadam(num_shards=3, backend="local", **settings))
    one.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(other.optimizer, ours.DistNadam) and other.optimizer.num_shards == 3
    for made in (one, other):
        fit(made)
    assert gap(one, other) == 0.0
    theirs = model(keras.optimizers.Nadam(**settings))
    theirs.optimizer.build(theirs.trainable_variables)
    store: dict[str, Any] = {}
    one.optimizer.save_own_variables(store)
    theirs.optimizer.load_own_variables(store)
    theirs.set_weights(one.get_weights())
    for made in (one, theirs):
        fit(made)
    assert gap(one, theirs) < 1e-5
    with pytest.raises(StructureError, match=r"expected \d+ arrays"):
        one.optimizer.load_own_variables({str(i): np.array(0.1) for i in range(3)})
    untrained = narrow(ours.DistNadam(learning_rate=0.5))
    untrained.save(tmp_path / "untrained.keras")
    loaded = keras.saving.load_model(tmp_path / "untrained.keras")
    fit(loaded)
    assert loaded.optimizer.cluster.iterations == 4


@costly_on_jax
def test_pickling_keeps_settings_and_moments() -> None:
    fresh = ours.DistNadamW(learning_rate=0.5, options=Options(on_nonfinite="skip"))
    assert pickle.loads(pickle.dumps(fresh)).get_config() == fresh.get_config()
    settings = {"learning_rate": 0.01, "gradient_accumulation_steps": 3}
    one = trained(ours.DistNadam(**settings))
    copied = pickle.loads(pickle.dumps(one.optimizer))
    copied.build(one.trainable_variables)
    before, after = one.optimizer.slots(), copied.slots()
    assert before.iterations == after.iterations == 2
    assert int(copied._iterations.numpy()) == 8  # two micro-batches wait for a third
    for name, moment in before.m.items():
        np.testing.assert_array_equal(moment, after.m[name])
    for first, second in zip(
        one.optimizer._accumulated_gradients, copied._accumulated_gradients, strict=True
    ):
        np.testing.assert_array_equal(first.numpy(), second.numpy())
        assert np.abs(first.numpy()).max() > 0


@costly_on_jax
def test_a_classifier_stops_early_and_keeps_its_best_weights(tmp_path: Path) -> None:
    made = model(ours.DistNadam(learning_rate=0.02))
    stopping = keras.callbacks.EarlyStopping(
        monitor="val_loss", patience=2, restore_best_weights=True, min_delta=0.05
    )
    callbacks = [
        stopping,
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=0.05),
    ]
    keras.utils.set_random_seed(1)
    history = made.fit(
        X, Y, epochs=40, batch_size=32, verbose=0, validation_split=0.25, callbacks=callbacks
    )
    assert len(history.history["loss"]) < 40
    assert history.history["accuracy"][-1] > 0.85  # as by Keras's own: 0.8646 on JAX
    loss = made.evaluate(X[-32:], Y[-32:], verbose=0)[0]
    assert loss == pytest.approx(stopping.best, abs=1e-5)
    best = made.get_weights()[0]
    fit(made)  # goes on from the weights that the callback has set
    stepped = np.asarray(made.optimizer.cluster.get_params()[made.optimizer.names[0]])
    np.testing.assert_array_equal(stepped, made.get_weights()[0])
    assert 0 < np.abs(stepped - best).max() < 0.2
    assert keras.saving.load_model(tmp_path / "best.keras").evaluate(X, Y, verbose=0)[1] > 0.6


def test_a_callback_saves_the_cluster_and_a_fresh_model_goes_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    settings = {"learning_rate": 0.01, "use_ema": True, "ema_momentum": 0.5}
    one = model(ours.DistNadam(**settings))
    saver = ours.ClusterCheckpoint(tmp_path, save_freq=4)
    fit(one, 1, callbacks=[saver])
    with DistNadam.restore(tmp_path, backend="local", num_shards=2) as cluster:
        assert cluster.iterations == 4 and cluster.lr == pytest.approx(0.01)
    other = model(ours.DistNadam(**settings))
    ours.restore(other, tmp_path)
    one.set_weights(other.get_weights())  # Keras has put the average in their place
    fit(one)
    fit(other)
    assert gap(one, other) == 0.0
    with pytest.raises(ConfigError, match=r"one of distnadam\.keras"):
        fit(narrow("adam"), callbacks=[saver])
    with pytest.raises(StructureError, match="expected tensors of shapes"):
        ours.restore(narrow(ours.DistNadam(**settings)), tmp_path)


@costly_on_jax
def test_loss_scaling_of_keras_works_for_one_worker_and_is_refused_for_several() -> None:
    made = trained(keras.optimizers.LossScaleOptimizer(ours.DistNadam(learning_rate=0.01)))
    assert gap(made, trained(keras.optimizers.Nadam(learning_rate=0.01))) < 1e-4
    several = ours.DistNadam(num_workers=2, rank=0, cluster_name="two", backend="ray")
    with pytest.raises(ConfigError, match="auto_scale_loss=False"):
        keras.optimizers.LossScaleOptimizer(several)


def test_what_is_wrong_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="beta_1"):
        ours.DistNadam(beta_1=1.5)
    with pytest.raises(ValueError, match="Only one of"):
        ours.DistNadam(clipnorm=1.0, clipvalue=1.0)
    with pytest.raises(ConfigError, match="needs a name of the cluster"):
        ours.DistNadam(num_workers=2, rank=1)
    held = keras.Variable(np.ones(3, np.float32))
    optimizer = ours.DistNadam()
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply_gradients([(None, held)])
    ones = keras.ops.ones(3)
    optimizer.apply_gradients([(ones, held)])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply_gradients([(ones, keras.Variable(np.ones(3, np.float32)))])
    assert int(optimizer.iterations.numpy()) == 1


def test_a_scale_that_the_shards_keep_follows_the_rounds_and_changes_nothing_else() -> None:
    scale = LossScale(init_scale=8.0, growth_interval=2)
    scaled = trained(ours.DistNadam(loss_scale=scale), 1, run_eagerly=True)
    plain = trained(ours.DistNadam(), 1, run_eagerly=True)
    cluster = scaled.optimizer.cluster
    assert cluster.loss_scale == 8.0 * 2 ** (cluster.iterations // 2) > 8.0
    for found, expected in zip(scaled.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    again = ours.DistNadam.from_config(scaled.optimizer.get_config())
    assert again.loss_scale == scale
    unscaled = [
        keras.ops.ones(v.shape) for v in scaled.trainable_variables
    ]  # by a loop of one's own
    before = scaled.get_weights()
    scaled.optimizer.apply(unscaled, scaled.trainable_variables)
    plain.optimizer.apply(unscaled, plain.trainable_variables)
    for found, expected in zip(scaled.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(before[0], scaled.get_weights()[0])
    with pytest.raises(ConfigError, match="give one of them"):
        ours.DistNadam(loss_scale=scale, loss_scale_factor=2.0)
    with pytest.raises(ConfigError, match="scale what loss_scale scales already: "):
        keras.optimizers.LossScaleOptimizer(ours.DistNadam(loss_scale=scale))
    if BACKEND == "jax":
        with pytest.raises(ConfigError, match="run_eagerly=True"):
            trained(ours.DistNadam(loss_scale=scale), 1)


@pytest.mark.skipif(BACKEND != "jax", reason="of a loop of one's own in JAX")
def test_a_scale_of_the_shards_in_a_loop_of_one_s_own_is_never_compiled_into_it() -> None:
    import jax

    held, twin = (keras.Variable(np.ones(3, np.float32)) for _ in range(2))
    scaled = ours.DistNadam(0.1, epsilon=1.0, loss_scale=LossScale(init_scale=64.0))
    plain = ours.DistNadam(0.1, epsilon=1.0)
    scaled.build([held])
    gradient = jax.grad(lambda x: scaled.scale_loss((x * x).sum()))
    for _ in range(3):
        scaled.apply([gradient(held.value)], [held])
        plain.apply([2 * twin.value], [twin])
    np.testing.assert_allclose(held.numpy(), twin.numpy(), rtol=1e-6)
    for compiled in (jax.jit(gradient), jax.grad(jax.jit(lambda x: scaled.scale_loss(x.sum())))):
        with pytest.raises(ConfigError, match=r"outside of jax\.jit"):
            compiled(held.value)
    scaled.apply([gradient(held.value)], [held])
    assert scaled.cluster.iterations == 4


@pytest.mark.skipif(BACKEND != "jax", reason="compiled by JAX alone")
def test_a_step_that_jax_has_compiled_and_the_shards_refuse_fails_alone() -> None:
    import jax

    optimizer = ours.DistNadam(learning_rate=0.01)
    made = narrow(optimizer)
    made.train_on_batch(X, Y)
    with pytest.raises(jax.errors.JaxRuntimeError, match="NonFiniteGradient: round 2 was refused"):
        made.train_on_batch(X * np.nan, Y)
    assert optimizer.cluster.iterations == 1
    other = narrow(ours.DistNadam(learning_rate=0.01))
    other.train_on_batch(X, Y)
    assert other.optimizer.cluster.iterations == 1
    optimizer.close()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_variable_without_a_gradient_stands_still_and_a_file_keeps_its_clock() -> None:
    def stepped(optimizer: Any, held: list[Any], steps: range) -> None:
        for step in steps:
            gradients = [keras.ops.ones(2) * (1.0 + step), keras.ops.ones(3) if step % 2 else None]
            optimizer.apply_gradients(zip(gradients, held, strict=True))

    def made() -> list[Any]:
        return [keras.Variable(np.ones(n, np.float32), name=f"v{n}") for n in (2, 3)]

    one, first = ours.DistNadam(learning_rate=0.1, num_shards=2, backend="local"), made()
    stepped(one, first, range(1))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(first[1].value), np.ones(3))
    stepped(one, first, range(1, 5))
    store: dict[str, Any] = {}
    one.save_own_variables(store)
    other, second = ours.DistNadam(learning_rate=0.1), made()
    other.build(second)
    other.load_own_variables(store)
    for variable, value in zip(second, first, strict=True):
        variable.assign(value.value)
    assert [clock.steps for clock in other.slots().clocks.values()] == [5, 2]
    for optimizer, held in ((one, first), (other, second)):
        stepped(optimizer, held, range(5, 8))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a.value, b.value)))
    alone, third = keras.optimizers.Nadam(learning_rate=0.1), made()[1:]
    for _ in range(4):
        alone.apply_gradients([(keras.ops.ones(3), third[0])])
    np.testing.assert_allclose(
        *map(keras.ops.convert_to_numpy, (first[1].value, third[0].value)), rtol=1e-5
    )


def test_an_update_that_is_computed_and_thrown_away_is_refused() -> None:
    held = keras.Variable(np.ones(3, np.float32))
    optimizer = ours.DistNadam()
    optimizer.build([held])
    state = [v.value for v in optimizer.variables]
    ones = keras.ops.ones(3)
    optimizer.stateless_apply(state, [ones], [held.value])
    with pytest.raises(StructureError, match="computed and thrown away"):
        optimizer.stateless_apply(state, [ones], [held.value])


def test_constraints_and_variables_that_are_overwritten_are_keras_own() -> None:
    held = keras.Variable(np.full((2, 2), -1.0, np.float32))
    held.constraint = keras.constraints.NonNeg()
    scale = keras.Variable(np.ones(2, np.float32))
    scale.overwrite_with_gradient = True
    optimizer = ours.DistNadam(learning_rate=1e-3)
    given = keras.ops.convert_to_tensor(np.array([5.0, 6.0], np.float32))
    for _ in range(2):
        optimizer.apply_gradients([(keras.ops.ones((2, 2)), held), (given, scale)])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(held.value), np.zeros((2, 2)))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(scale.value), [5.0, 6.0])
    assert optimizer.names == (held.path,)


@pytest.mark.skipif(BACKEND == "torch", reason="is what runs them")
def test_all_of_it_on_torch() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-q",
            __file__,
        ],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count(".") > 10  # one for each that passed
