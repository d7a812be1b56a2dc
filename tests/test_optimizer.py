"""The face: what is refused before anything is allocated or applied, and what the messages say."""

import pickle
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.backends import factory
from distnadam.checkpoint import store
from distnadam.errors import (
    ConfigError,
    GradientError,
    LifecycleError,
    NonFiniteGradient,
    PushesPending,
    StructureError,
)
from distnadam.schedules import Piecewise
from tests.models import bits, gradients, params, run


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("epsilon", -1e-7),
        ("epsilon", float("inf")),
        ("schedule_decay", -1.0),
        ("schedule_decay", float("nan")),
        ("beta_1", 1.0),
        ("beta_1", -0.1),
        ("beta_2", 1.5),
        ("clipnorm", -1.0),
        ("clipvalue", -0.5),
        ("global_clipnorm", -2.0),
        ("num_shards", 0),
        ("num_workers", 1.5),
        ("replicas", 2),
        ("backend", "spark"),
        ("name", "../up"),
    ],
)
def test_an_argument_out_of_its_range_is_named_with_its_value(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument}.*{value!r}"):
        DistNadam(**{argument: value})


def test_an_unknown_keyword_is_a_type_error_and_learning_rate_gets_a_hint() -> None:
    with pytest.raises(TypeError, match="'decay'"):
        DistNadam(decay=0.1)
    with pytest.raises(TypeError, match="did you mean lr"):
        DistNadam(learning_rate=0.1)


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({}, "at least one array"),
        ({"a": np.arange(3)}, "'a'.*int64"),
        ({"a": [np.ones(2, complex)]}, "'a/0'.*complex128"),
        ({"a": np.array([object()])}, "'a'.*object"),
        ({"a": np.array([1, np.nan])}, "'a'.*NaN"),
        ({"a": None}, "'a'.*NoneType"),
        ({"a": 1.0}, "'a'.*Python float"),
        ({"a": {1, 2}}, "'a'.*set"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "two tensors have the path 'a/b'"),
        ({("x",): np.ones(1)}, "keys of str or int"),
    ],
)
def test_what_cannot_be_a_parameter_is_named_by_its_path(tree: Any, told: str) -> None:
    with pytest.raises(StructureError, match=told):
        DistNadam(backend="local").build(tree)


@pytest.mark.on_ray(slow=["ray-bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
def test_parameters_come_back_in_their_own_dtype_and_shape(dtype: Any, backend: str) -> None:
    tree = {
        "a": np.linspace(-1, 1, 2500).reshape(50, 50).astype(dtype),
        "b": (np.ones((), dtype)[()], np.zeros((2, 0), dtype)),
    }
    with DistNadam(num_shards=2, backend=backend).build(tree) as optimizer:
        got = optimizer.get_params()
        assert got["a"].dtype == np.dtype(dtype) and np.array_equal(got["a"], tree["a"])
        assert isinstance(got["b"][0], np.generic) and isinstance(got["b"], tuple)
        worker = optimizer.worker(0)
        stepped = worker.step(
            {"a": np.ones((50, 50), dtype), "b": (np.ones((), dtype)[()], np.zeros((2, 0), dtype))}
        )
        assert stepped["a"].dtype == np.dtype(dtype) and not np.array_equal(stepped["a"], tree["a"])
        assert not stepped["a"].flags.writeable


def test_half_precision_parameters_have_float32_masters() -> None:
    tree = {"w": np.ones(4, np.float16)}
    with (
        DistNadam(lr=1e-5, backend="local").build(tree) as half,
        DistNadam(lr=1e-5, backend="local").build({"w": np.ones(4, "f4")}) as single,
    ):
        for _ in range(200):  # each step alone would be lost in float16
            half.apply_gradients({"w": np.ones(4, np.float16)})
            single.apply_gradients({"w": np.ones(4, np.float32)})
        assert np.array_equal(half.get_params()["w"], single.get_params()["w"].astype(np.float16))
        assert half.get_params()["w"][0] < 1


BAD_GRADIENTS = [
    (lambda g: g | {"half": np.ones(3, np.float16)}, r"'half'.*\(40, 50\).*\(3,\)"),
    (lambda g: g | {"half": np.ones((40, 50), int)}, "'half'.*int64"),
    (lambda g: g | {"half": None}, "'half'.*None"),
    (lambda g: {k: v for k, v in g.items() if k != "half"}, "'half' is missing"),
    (lambda g: g | {"more": np.ones(1)}, "'more' is not a tensor"),
    (lambda g: g | {"layers": [np.ones(4, complex), g["layers"][1]]}, "'layers/0'.*complex128"),
]


@pytest.mark.parametrize(("spoil", "told"), BAD_GRADIENTS)
def test_a_gradient_of_the_wrong_kind_names_its_tensor_and_nothing_is_applied(
    spoil: Any, told: str
) -> None:
    with DistNadam(num_shards=3, backend="local").build(params()) as optimizer:
        before = bits(optimizer)
        for push in (optimizer.worker(0).push, optimizer.apply_gradients):
            with pytest.raises(StructureError, match=told):
                push(spoil(gradients(0, 0)))
        assert bits(optimizer) == before and optimizer.round == 0


@pytest.mark.on_ray("ray-nan", slow=["ray-2e+19"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e19])
def test_a_non_finite_gradient_names_tensor_and_worker_and_no_shard_moves(
    value: float, backend: str
) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend=backend).build(params()) as optimizer:
        before = bits(optimizer)
        workers = [optimizer.worker(rank) for rank in range(2)]
        bad = gradients(0, 1)
        bad["dense"]["kernel"][89, 69] = value
        tickets = [workers[0].push(gradients(0, 0)), workers[1].push(bad)]
        for ticket in tickets:
            with pytest.raises(
                NonFiniteGradient, match=r"worker 1: gradient 'dense/kernel'.*\(89, 69\)"
            ):
                ticket.result()
        assert bits(optimizer) == before
        assert (optimizer.round, optimizer.iterations, optimizer.skipped) == (1, 0, 1)
        with pytest.raises(NonFiniteGradient, match="dense/kernel"):
            optimizer.apply_gradients(bad)
        for worker in workers:
            worker.pull()  # the round that was refused from outside is over for the workers too
        tickets = [worker.push(gradients(0, worker.rank)) for worker in workers]
        assert [ticket.result() for ticket in tickets] == [1, 1]


@pytest.mark.on_ray
def test_a_non_finite_round_may_be_skipped_and_is_counted(backend: str) -> None:
    options = Options(on_nonfinite="skip")
    with DistNadam(num_shards=2, backend=backend, options=options).build(
        {"w": np.ones(3, np.float32)}
    ) as optimizer:
        worker = optimizer.worker(0)
        assert np.array_equal(worker.step({"w": np.full(3, np.nan)})["w"], np.ones(3))
        worker.step({"w": np.ones(3, np.float32)})
        assert (optimizer.round, optimizer.iterations, optimizer.skipped) == (2, 1, 1)


def test_a_float64_norm_that_overflows_is_refused_by_name() -> None:
    with DistNadam(clipnorm=1.0, backend="local").build({"w": np.ones(9)}) as optimizer:
        with pytest.raises(NonFiniteGradient, match=r"norm of the mean gradient of 'w' overflows"):
            optimizer.apply_gradients({"w": np.full(9, 1.3e154)})
        assert optimizer.apply_gradients({"w": np.ones(9)}) == 1


@pytest.mark.on_ray
def test_set_weights_names_length_index_and_shape(backend: str) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        run(optimizer, 0, 2)
        weights, before = optimizer.get_weights(), bits(optimizer)
        with pytest.raises(ValueError, match=r"expected 14 arrays.*got 13"):
            optimizer.set_weights(weights[:-1])
        with pytest.raises(
            ValueError, match=r"index 3: expected shape \(90, 70\), got shape \(2,\)"
        ):
            optimizer.set_weights([*weights[:3], np.ones(2), *weights[4:]])
        with pytest.raises(ValueError, match="index 0: expected a whole number"):
            optimizer.set_weights([np.array(-1), *weights[1:]])
        assert bits(optimizer) == before


def test_set_params_is_whole_or_not_at_all() -> None:
    with DistNadam(num_shards=2, backend="local").build(params()) as optimizer:
        before = bits(optimizer)
        bad = params(seed=1)
        bad["half"] = bad["half"] * np.float16(np.nan)
        with pytest.raises(StructureError, match=r"'half'.*finite"):
            optimizer.set_params(bad)
        assert bits(optimizer) == before


@pytest.mark.on_ray(slow=["ray"])
def test_apply_gradients_is_refused_while_pushes_wait_and_they_still_count(backend: str) -> None:
    with DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        first = workers[0].push(gradients(0, 0))
        optimizer.iterations  # noqa: B018  # a call that every shard answers after the push, so that it has arrived
        with pytest.raises(PushesPending, match=r"ranks 0 have pushed"):
            optimizer.apply_gradients(gradients(0, 0))
        second = workers[1].push(gradients(0, 1))
        assert first.result() == second.result() == 1


@pytest.mark.on_ray
def test_the_learning_rate_is_set_while_running_and_kept_in_the_config(backend: str) -> None:
    with DistNadam(num_shards=2, backend=backend).build(
        {"w": np.ones(3000, np.float32)}
    ) as optimizer:
        worker = optimizer.worker(0)
        optimizer.lr = Piecewise((0,), (0.0, 0.1))
        assert np.array_equal(worker.step({"w": np.ones(3000, np.float32)})["w"], np.ones(3000))
        assert not np.array_equal(worker.step({"w": np.ones(3000, np.float32)})["w"], np.ones(3000))
        assert optimizer.get_config()["lr"] == {
            "class_name": "Piecewise",
            "config": {"boundaries": [0], "rates": [0.0, 0.1]},
        }
        optimizer.lr = 0.25
        assert optimizer.lr == 0.25
        with pytest.raises(ConfigError, match=r"lr.*-1"):
            optimizer.lr = -1


def test_a_plain_function_is_a_schedule_too_but_cannot_be_saved(tmp_path: Any) -> None:
    with DistNadam(lr=lambda step: 0.1 / (step + 1), backend="local").build(
        {"w": np.ones(3)}
    ) as optimizer:
        optimizer.apply_gradients({"w": np.ones(3)})
        assert DistNadam.from_config(optimizer.get_config()).lr is optimizer.lr
        with pytest.raises(ConfigError, match="plain function"):
            optimizer.save(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_get_gradients_takes_a_loss_that_returns_its_gradients() -> None:
    tree = {"a": np.array([1.0, 2.0]), "b": np.float64(3)}
    got = DistNadam().get_gradients(
        lambda p: ((p["a"] ** 2).sum() + p["b"], {"a": 2 * p["a"], "b": np.float64(1)}), tree
    )
    assert [g.tolist() for g in got] == [[2.0, 4.0], 1.0]


@pytest.mark.parametrize(
    ("gradient", "told"),
    [
        (None, "'b'.*None"),
        (np.ones(2), r"'b'.*shape \(\).*shape \(2,\)"),
        (np.int64(1), "'b'.*int64"),
    ],
)
def test_a_gradient_that_cannot_be_had_names_its_parameter(gradient: Any, told: str) -> None:
    tree = {"a": np.ones(2), "b": np.float64(3)}
    with pytest.raises(GradientError, match=told):
        DistNadam().get_gradients(lambda p: (0.0, {"a": p["a"], "b": gradient}), tree)
    with pytest.raises(ValueError, match=r"'a', 'b'.*str"):
        DistNadam().get_gradients("loss", tree)


@pytest.mark.on_ray
def test_get_updates_pushes_and_is_waited_for_and_needs_a_single_worker(backend: str) -> None:
    def loss(p: Any) -> Any:
        return 0.5 * float((p["w"] ** 2).sum()), {"w": p["w"]}

    start = {"w": np.ones(3000, np.float32)}
    with (
        DistNadam(num_shards=2, backend=backend).build(start) as one,
        DistNadam(backend="local").build(start) as other,
    ):
        for step in range(1, 4):
            assert one.get_updates(loss, one.get_params()).result() == step
            other.apply_gradients(other.get_params())
        assert bits(one) == bits(other)
    with (
        DistNadam(num_workers=2, backend="local").build(start) as several,
        pytest.raises(LifecycleError, match=r"worker\(rank\)"),
    ):
        several.get_updates(loss, start)


def test_use_before_build_after_close_and_twice_is_said() -> None:
    optimizer = DistNadam(backend="local")
    with pytest.raises(LifecycleError, match=r"call build\(params\) first"):
        optimizer.get_params()
    optimizer.build({"w": np.ones(1)})
    with pytest.raises(LifecycleError, match="built already"):
        optimizer.build({"w": np.ones(1)})
    with pytest.raises(LifecycleError, match="lives in its process"):
        pickle.dumps(optimizer)
    worker = optimizer.worker(0)
    with pytest.raises(ConfigError, match=r"rank must be in \[0, 1\), got 1"):
        optimizer.worker(1)
    optimizer.close()
    optimizer.close()
    for call in (optimizer.get_params, lambda: optimizer.build({"w": np.ones(1)}), worker.pull):
        with pytest.raises(LifecycleError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("index", "value", "told"),
    [
        (0, 1e300, "index 0: expected a whole number of steps"),
        (1, 5.0, r"index 1: expected a product of momentum coefficients, in \[0, 1\], got 5.0"),
        (2, np.full(70, 1e300), "index 2: expected finite float32 numbers"),
        (2, np.zeros(70, "V4"), "index 2: expected finite float32 numbers"),
    ],
)
def test_weights_that_no_run_can_have_are_refused(index: int, value: Any, told: str) -> None:
    with DistNadam(backend="local").build(params()) as optimizer:
        weights = optimizer.get_weights()
        weights[index] = np.asarray(value)
        before = bits(optimizer)
        with pytest.raises(StructureError, match=told):
            optimizer.set_weights(weights)
        with pytest.raises(StructureError, match="got None"):
            optimizer.set_weights(None)  # type: ignore[arg-type]
        assert bits(optimizer) == before


def test_arrays_of_the_other_byte_order_are_taken() -> None:
    with DistNadam(backend="local").build({"w": np.ones(3, ">f4")}) as optimizer:
        optimizer.apply_gradients({"w": np.ones(3, ">f8")})
        assert optimizer.get_params()["w"].dtype == np.float32


@pytest.mark.on_ray
def test_a_schedule_that_raises_is_named_with_its_step_and_can_be_replaced(backend: str) -> None:
    def schedule(step: int) -> float:
        if step == 1:
            raise ZeroDivisionError("no rate")
        return 0.1

    with (
        DistNadam(lr=schedule, num_shards=2, backend=backend).build(params()) as optimizer,
        optimizer.worker(0) as worker,
    ):
        worker.step(gradients(0, 0))
        with pytest.raises(
            ConfigError, match="lr at step 1: the schedule raised ZeroDivisionError: no rate"
        ):
            worker.step(gradients(1, 0))
        optimizer.lr = 0.1
        worker.step(gradients(1, 0))
        assert optimizer.iterations == 2


def test_a_named_checkpoint_restores_into_this_process(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(factory, "resolve", lambda asked, several: "local")
    with DistNadam(backend="local").build({"w": np.ones(3)}) as optimizer:
        path = optimizer.save(tmp_path)
    manifest = store.load(path)
    named = replace(manifest, topology=manifest.topology | {"name": "mine"})
    store.commit(path, named)
    with DistNadam.restore(path) as restored:
        assert (restored.backend_name, restored.get_config()["name"]) == ("local", None)
    assert "restored without its name 'mine', as a local optimizer" in caplog.text
    with pytest.raises(ConfigError, match="name='other' needs backend='ray'"):
        DistNadam.restore(path, name="other")
