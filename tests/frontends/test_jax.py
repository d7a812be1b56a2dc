"""A JAX script trains with our optimizers as with optax's: by steps, and by a transformation."""

import doctest
import pickle
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.errors import ConfigError, NonFiniteGradient, StructureError

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
ours = pytest.importorskip("distnadam.jax")

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = jnp.array(RNG.standard_normal((20, 5)), jnp.float32)
PARAMS = {
    "a": jnp.array(RNG.standard_normal((5, 3)), jnp.float32),
    "b": [jnp.array(RNG.standard_normal(7), jnp.float32), jnp.float32(2.0)],
}
MASK = {"a": True, "b": [False, True]}
HALVING = optax.exponential_decay(0.05, 5, 0.5)


@jax.jit
def gradient(params: Any) -> Any:
    def loss(p: Any) -> Any:
        found = jnp.matmul(X, p["a"], precision="highest")  # a GPU's usual is of 10 bits, by which
        # gradients of parameters that differ in the last bit differ by a thousandth
        return (found**2).mean() + (p["b"][0] ** 2).sum() * p["b"][1]

    return jax.grad(loss)(params)


def by_updates(transformation: Any, steps: int = 12, *, jit: bool = False) -> Any:
    def step(params: Any, state: Any) -> Any:
        updates, state = transformation.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    stepped = jax.jit(step) if jit else step
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(steps):
        params, state = stepped(params, state)
    return params


def by_steps(optimizer: Any, steps: int = 12) -> Any:
    params = PARAMS
    for _ in range(steps):
        params = optimizer.step(params, gradient(params))
    return params


def close(one: Any, other: Any, least: float = 1e-5) -> None:
    """Compare what 12 steps of 0.05 or less have made of numbers near 1: by a formula in another
    order, and on a GPU by contracted operations too, which differ in the last bits of each step.
    """
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=least, atol=least)


@pytest.mark.parametrize(
    ("theirs", "kind", "given"),
    [
        (optax.nadam(0.01), ours.DistNadam, {"learning_rate": 0.01, "num_shards": 2}),
        (
            optax.nadamw(0.01, weight_decay=0.1, mask=MASK),
            ours.DistNadamW,
            {"learning_rate": 0.01, "weight_decay": 0.1, "mask": lambda params: MASK},
        ),
        (optax.adam(HALVING), ours.DistAdam, {"learning_rate": HALVING}),
        (optax.adamw(0.01, 0.8), ours.DistAdamW, {"learning_rate": 0.01, "b1": 0.8}),
    ],
)
def test_steps_and_updates_are_those_of_optax(theirs: Any, kind: Any, given: Any) -> None:
    expected = by_updates(theirs)
    close(by_steps(kind(**given, backend="local")), expected)
    close(by_updates(kind(**given, backend="local").transformation()), expected)


def test_an_update_under_jit_is_the_one_outside() -> None:
    close(
        by_updates(ours.DistNadam(0.01).transformation(), jit=True), by_steps(ours.DistNadam(0.01))
    )


def test_a_step_returns_the_very_bits_of_the_shards_and_keeps_earlier_ones() -> None:
    optimizer = ours.DistNadam(0.1)
    first = optimizer.step(PARAMS, gradient(PARAMS))
    kept = np.array(first["a"])
    second = optimizer.step(first, gradient(first))
    third = optimizer.step(second, gradient(second))
    np.testing.assert_array_equal(first["a"], kept)
    assert isinstance(third["a"], jax.Array) and third["b"][1].shape == ()
    np.testing.assert_array_equal(third["a"], optimizer.cluster.get_params()["a"])


def test_it_is_distnadam_to_the_bit_and_takes_over_what_the_client_changes(tmp_path: Any) -> None:
    optimizer = ours.DistNadam(0.1)
    params = by_steps(optimizer, 3)
    changed = params | {"a": params["a"] * 0.5}
    after = optimizer.step(changed, gradient(changed))
    with DistNadam(0.1, epsilon=1e-8, formula="nadam_optax", backend="local") as other:
        other.build(PARAMS)
        at = PARAMS
        for _ in range(3):
            other.apply_gradients(gradient(at))
            at = jax.tree.map(jnp.array, other.get_params())
        other.set_params(changed)
        other.apply_gradients(gradient(changed))
        for one, held in zip(
            jax.tree.leaves(after), jax.tree.leaves(other.get_params()), strict=True
        ):
            np.testing.assert_array_equal(one, held)
    optimizer.cluster.save(tmp_path)
    optimizer.close()
    with DistNadam.restore(tmp_path, backend="local", num_shards=2) as restored:
        assert restored.iterations == 4


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda t: optax.chain(t, optax.scale(0.5)), "not those that the last update led"),
        (lambda t: optax.MultiSteps(t, 2).gradient_transformation(), "thrown away"),
        (lambda t: optax.apply_if_finite(t, 3), None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_wrapper_that_changes_or_drops_an_update_is_refused(wrap: Any, said: str | None) -> None:
    wrapped = wrap(ours.DistNadam(0.01).transformation())
    if said is None:
        close(by_updates(wrapped, 3), by_updates(optax.nadam(0.01), 3))
        return
    with pytest.raises((StructureError, jax.errors.JaxRuntimeError), match=said):
        by_updates(wrapped, 4)


def compiled(transformation: Any) -> Any:
    """A train step, and what it begins with."""

    @jax.jit
    def step(params: Any, state: Any, scale: Any) -> Any:
        grads = jax.tree.map(lambda g: g * scale, gradient(params))
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (PARAMS, transformation.init(PARAMS))


def later(value: float, size: int = 300) -> Any:
    """A number that is still computed, so that a program that takes it does not run at once."""
    return jax.jit(lambda a: (a @ a @ a).sum() * 0 + value)(jnp.ones((size, size)))


def unseen(program: Any) -> Any:
    """What a program returned that is to fail, and has not run yet."""
    for size in (300, 1000, 2000, 3000):
        later(np.nan, size).block_until_ready()  # is compiled
        try:
            return program(later(np.nan, size))
        except jax.errors.JaxRuntimeError:  # the number was there already
            continue
    raise AssertionError("every one ran at once")


def test_an_update_that_is_refused_under_jit_fails_its_own_step_and_none_after_it() -> None:
    optimizer, other = ours.DistNadam(0.1), ours.DistNadam(0.1)
    step, start = compiled(optimizer.transformation())
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    anyone = jax.jit(lambda x: jax.experimental.io_callback(np.sin, shape, x, ordered=True))
    for value in (later(np.nan), jnp.float32(np.nan)):  # it is told of later, or at the call
        with pytest.raises(jax.errors.JaxRuntimeError, match="NonFiniteGradient: round"):
            jax.block_until_ready(step(*start, value))
        assert float(anyone(jnp.float32(0.0))) == 0.0
    one = step(*step(*start, later(1.0)), 1.0)
    jax.block_until_ready(one)
    with pytest.raises(jax.errors.JaxRuntimeError, match="thrown away, or made twice"):
        jax.block_until_ready(step(*start, later(1.0)))
    one = step(*one, 1.0)
    step, start = compiled(other.transformation())
    expected = step(*step(*step(*start, 1.0), 1.0), 1.0)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert optimizer.cluster.iterations == 3
    optimizer.close(), other.close()


def test_a_refused_update_that_nobody_has_looked_at_is_raised_by_cluster_once() -> None:
    optimizer, other = ours.DistNadam(0.1), ours.DistNadam(0.1)
    step, start = compiled(optimizer.transformation())
    begun = step(*start, 1.0)
    params = other.step(PARAMS, gradient(PARAMS))
    for _ in range(2):
        results = unseen(lambda value: step(*begun, value))
        assert other.cluster.iterations == 1  # whose it is not
        with pytest.raises(NonFiniteGradient, match="'a' is not finite"):
            _ = optimizer.cluster
        assert optimizer.cluster.iterations == 1
        jax.effects_barrier()
        with pytest.raises(jax.errors.JaxRuntimeError, match="NonFiniteGradient"):
            jax.block_until_ready(results)
    unseen(lambda value: step(*begun, value))
    optimizer.close()
    jax.effects_barrier()
    other.step(params, gradient(params))
    assert other.cluster.iterations == 2


def test_an_optimizer_that_has_no_shards_yet_travels() -> None:
    step, start = compiled(pickle.loads(pickle.dumps(ours.DistNadam(0.1))).transformation())
    close(step(*start, 1.0)[0], by_steps(ours.DistNadam(0.1), 1))


def test_a_failure_that_is_not_ours_stays_jax_s() -> None:
    optimizer = ours.DistNadam(0.1)
    optimizer.step(PARAMS, gradient(PARAMS))

    def fails(given: Any) -> Any:
        raise ValueError("of somebody else")

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    unseen(jax.jit(lambda x: jax.experimental.io_callback(fails, shape, x)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="of somebody else"):
        _ = optimizer.cluster
    by_updates(ours.DistNadam(0.1).transformation(), 1, jit=True)  # JAX tells of the last alone


def test_what_cannot_be_right_is_refused_by_name() -> None:
    optimizer = ours.DistNadam(0.1)
    with pytest.raises(ConfigError, match=r"called under jax\.jit"):
        jax.jit(optimizer.step)(PARAMS, PARAMS)
    with pytest.raises(ConfigError, match="half precision"):
        optimizer.transformation().init({"w": jnp.ones(3, jnp.bfloat16)})
    with pytest.raises(ConfigError, match="needs params"):
        optimizer.transformation().update(PARAMS, optimizer.transformation().init(PARAMS))
    optimizer.step(PARAMS, PARAMS)
    with pytest.raises(StructureError, match="grads: expected PyTreeDef"):
        optimizer.step(PARAMS, {"a": PARAMS["a"]})
    half = ours.DistAdam(0.1)
    stepped = half.step({"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.ones(3, jnp.bfloat16)})
    assert stepped["w"].dtype == jnp.bfloat16


def test_what_is_changed_in_half_precision_leaves_the_masters_of_other_tensors() -> None:
    seen = []
    for is_halved in (False, True):
        params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
        optimizer = ours.DistAdam(1e-4)
        for _ in range(20):
            params = optimizer.step(params, params)
            if is_halved:
                params = params | {"b": params["b"] / 2}
        shards = optimizer.cluster.shards
        a, b = shards.layout.views(shards.read(("params",))[1]["params"])
        seen.append((a.tobytes(), b.tobytes()))
        assert (a < 1.0).all() and (params["a"] == jnp.bfloat16(a[0])).all()
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]


def test_the_example_in_its_docstring_runs() -> None:
    assert doctest.testmod(ours).attempted > 2
    assert doctest.testmod(ours).failed == 0


def test_a_flax_model_trains_with_two_lines_changed() -> None:
    nn = pytest.importorskip("flax.linen")
    x = jnp.array(np.random.default_rng(1).standard_normal((64, 6)), jnp.float32)
    y = (x[:, 0] > 0).astype(jnp.int32)
    made = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)])
    params = made.init(jax.random.key(0), x)

    @jax.jit
    def loss_and_gradients(params: Any) -> Any:
        def loss(p: Any) -> Any:
            each = optax.softmax_cross_entropy_with_integer_labels(made.apply(p, x), y)
            return each.mean()

        return jax.value_and_grad(loss)(params)

    optimizer = ours.DistNadamW(0.01)
    losses = []
    for _ in range(30):
        loss, grads = loss_and_gradients(params)
        params = optimizer.step(params, grads)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
