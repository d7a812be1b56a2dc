"""Clocks of single tensors: what a gradient that is None, on some or on all ranks, leaves as it is;
and groups with betas, and so a product of momentum coefficients, of their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash

from distnadam import DistAdam, DistNadam, Group, Options
from distnadam.checkpoint import store
from distnadam.checkpoint.diff import compare
from distnadam.checkpoint.inspect import describe
from distnadam.checkpoint.manifest import Manifest
from distnadam.errors import (
    CheckpointError,
    ConfigError,
    GradientError,
    IllegalMessage,
    NonFiniteGradient,
    StructureError,
)
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.protocol.round_settings import RoundSettings
from distnadam.schedules import Piecewise
from tests.models import bits

NAMES = ("a", "b", "c")
LACKED = [(), ("a",), ("a", "c"), (), ("b",), ("c",), ("a",), ("a",)]
"""By step, what has no gradient on any rank."""


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal(2000, np.float32),
        "b": rng.standard_normal((3, 23_000), np.float32),
        "c": rng.standard_normal(5),
    }


def gradients(step: int, rank: int = 0, lacked: tuple[str, ...] = ()) -> dict[str, Any]:
    rng = np.random.default_rng([step, rank])
    tree = {name: rng.standard_normal(x.shape).astype(x.dtype) for name, x in params().items()}
    return {name: None if name in lacked else x for name, x in tree.items()}


def clocks_of(optimizer: DistNadam) -> list[TensorClock]:
    clock, _ = optimizer.shards.read(("m",))
    return [clock.of_tensor(i) for i in range(len(optimizer.shards.layout.tensors))]


def held(optimizer: DistNadam, name: str) -> list[bytes]:
    """The bits of a tensor, its moments and average."""
    index = list(optimizer.get_params()).index(name)
    arrays = ("params", "m", "v", *(["ema"] if optimizer.get_config()["use_ema"] else []))
    _, state = optimizer.shards.read(arrays)
    views = (optimizer.shards.layout.views(flat)[index] for flat in state.values())
    return [view.tobytes() for view in views]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"formula": "adam", "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "clipnorm": 1.0},
    {"pull_dtype": "bfloat16", "clipvalue": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("how", ["outside", "worker", "views"])
@pytest.mark.parametrize(("kernel", "num_shards"), [("numpy", 1), ("fused", 3)])
def test_a_tensor_steps_as_if_alone_in_the_rounds_that_have_a_gradient_of_it(
    kernel: Any, num_shards: int, how: str, settings: dict[str, Any]
) -> None:
    common = {"use_ema": True, "backend": "local", **settings}
    options = Options(kernel=kernel, threads=2)
    with DistNadam(clocks="tensor", num_shards=num_shards, options=options, **common).build(
        params()
    ) as optimizer:
        worker = optimizer.worker(0)
        views = worker.gradients() if how == "views" else {}
        for step, lacked in enumerate(LACKED):
            tree = gradients(step, lacked=lacked)
            if how == "outside":
                optimizer.apply_gradients(tree)
                continue
            if how == "views":
                for name in set(NAMES) - set(lacked):
                    views[name][...] = tree[name]
                tree = {name: None if name in lacked else views[name] for name in NAMES}
            before = worker.pull() if lacked else {}
            before = {name: before[name].copy() for name in lacked}
            seen = worker.step(tree)
            assert all(seen[name].tobytes() == before[name].tobytes() for name in lacked)
        assert optimizer.iterations == optimizer.round == len(LACKED)
        for name, clock in zip(NAMES, clocks_of(optimizer), strict=True):
            with DistNadam(**common).build({name: params()[name]}) as alone:
                for step, lacked in enumerate(LACKED):
                    if name not in lacked:
                        alone.apply_gradients({name: gradients(step)[name]})
                assert held(optimizer, name) == held(alone, name)
                assert clock == TensorClock(*map(float, alone.get_weights()[:2]))


@pytest.mark.on_ray("ray")
def test_what_some_ranks_lack_counts_as_zeros_there(backend: str) -> None:
    lacks = [("a",), ("a", "b"), ("a", "b", "c")]  # by rank; the last has no gradient at all
    with (
        DistNadam(clocks="tensor", num_workers=3, num_shards=2, backend=backend).build(
            params()
        ) as optimizer,
        DistNadam(clocks="tensor", backend="local").build(params()) as expected,
    ):
        workers = [optimizer.worker(rank) for rank in range(3)]
        for step in range(3):
            trees = [gradients(step, rank, lacks[rank]) for rank in range(3)]
            tickets = [w.push(tree) for w, tree in zip(workers, trees, strict=True)]
            assert [ticket.result() for ticket in tickets] == [step + 1] * 3
            total = {"b": trees[0]["b"] + np.float32(0.0), "c": trees[0]["c"] + trees[1]["c"]}
            expected.apply_gradients(
                {"a": None, **{k: x / x.dtype.type(3) for k, x in total.items()}}
            )
        assert bits(optimizer) == bits(expected)
        assert clocks_of(optimizer)[0] == TensorClock(0, 1.0)


@pytest.mark.on_ray(slow=["ray"])
def test_a_round_that_no_rank_has_a_gradient_for_has_no_step_and_hangs_nobody(backend: str) -> None:
    none: dict[str, None] = dict.fromkeys(NAMES)
    with DistNadam(
        clocks="tensor", num_workers=2, num_shards=2, clipnorm=1.0, backend=backend
    ).build(params()) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]
        before = bits(optimizer)
        tickets = [worker.push(none) for worker in workers]
        assert [ticket.result() for ticket in tickets] == [0, 0]
        assert (optimizer.round, optimizer.iterations, optimizer.skipped) == (1, 0, 1)
        assert not tickets[0].found_inf
        assert optimizer.apply_gradients(none) == 0
        assert bits(optimizer) == before
        for worker in workers:
            worker.pull()
        tickets = [workers[0].push(none), workers[1].push(gradients(0))]
        assert [ticket.result() for ticket in tickets] == [1, 1]
        assert (optimizer.round, optimizer.iterations, optimizer.skipped) == (3, 1, 2)


def test_with_one_clock_a_gradient_that_is_none_is_the_error_that_it_was() -> None:
    with DistNadam(backend="local").build(params()) as optimizer:
        worker = optimizer.worker(0)
        for call in (worker.push, worker.accumulate, optimizer.apply_gradients):
            with pytest.raises(StructureError, match=r"gradients: 'a': expected shape .* got None"):
                call(gradients(0, lacked=("a",)))
        worker.push_tensor("a", gradients(0)["a"])
        with pytest.raises(
            StructureError, match=r"'b' was not pushed for this round \(2 missing\)"
        ):
            worker.push()
        host = optimizer.shards.backend.transport.hosts[0]  # type: ignore[attr-defined]
        with pytest.raises(IllegalMessage, match=r"without the gradients of tensors \[1\]"):
            host.shard.rounds._check_absent(RoundSettings(absent=frozenset({1})))
    with DistNadam(clocks="tensor", backend="local").build(params()) as optimizer:
        with pytest.raises(StructureError, match="'b' is missing"):
            optimizer.apply_gradients({"a": None, "c": None})
        with pytest.raises(NonFiniteGradient, match="'c' is not finite"):
            optimizer.apply_gradients({"a": None, "b": None, "c": np.full(5, np.nan)})


def test_tensors_that_were_not_pushed_and_micro_batches_without_them_have_no_gradient() -> None:
    with (
        DistNadam(clocks="tensor", backend="local").build(params()) as optimizer,
        DistNadam(clocks="tensor", backend="local").build(params()) as expected,
    ):
        worker = optimizer.worker(0)
        worker.step(gradients(0))  # leaves numbers where the others will be absent
        worker.push_tensor("c", gradients(1)["c"])
        worker.step()
        parts = [gradients(2, lacked=("a", "b")), gradients(3, lacked=("a", "c"))]
        for part in parts:
            worker.accumulate(part)
        worker.step()
        half = {name: x.astype(np.float16) for name, x in gradients(4).items() if name != "c"}
        worker.step({**half, "b": None, "c": gradients(4)["c"]})
        worker.step({**half, "b": gradients(5)["b"], "c": None})
        expected.apply_gradients(gradients(0))
        expected.apply_gradients(gradients(1, lacked=("a", "b")))
        expected.apply_gradients(
            {"a": None, "b": parts[1]["b"] / np.float32(2), "c": parts[0]["c"] / 2}
        )
        expected.apply_gradients({**half, "b": None, "c": gradients(4)["c"]})
        wide = half["a"].astype(np.float32)
        expected.apply_gradients({"a": wide, "b": gradients(5)["b"], "c": None})
        assert bits(optimizer) == bits(expected)


def test_a_loss_may_lack_gradients() -> None:
    with (
        DistNadam(clocks="tensor", backend="local").build(params()) as optimizer,
        DistNadam(clocks="tensor", backend="local").build(params()) as expected,
    ):
        given = gradients(0, lacked=("a",))
        assert optimizer.get_updates(lambda params: (0.0, given), params()).result() == 1
        expected.apply_gradients(given)
        assert bits(optimizer) == bits(expected)
        with pytest.raises(GradientError, match="'a': the loss gave no gradient for it"):
            optimizer.get_gradients(lambda params: (0.0, given), params())


def test_rates_follow_applied_rounds_and_a_global_norm_leaves_out_what_is_absent() -> None:
    rate = Piecewise((2,), (0.1, 0.01))
    big = {name: 1000 * x for name, x in gradients(0).items()}
    with (
        DistNadam(rate, clocks="tensor", global_clipnorm=1.0, backend="local").build(
            params()
        ) as optimizer,
        DistNadam(rate, global_clipnorm=1.0, backend="local").build({"c": params()["c"]}) as alone,
    ):
        for _ in range(3):
            optimizer.apply_gradients({"a": None, "b": None, "c": big["c"]})
            alone.apply_gradients({"c": big["c"]})
        assert optimizer.get_params()["c"].tobytes() == alone.get_params()["c"].tobytes()
        before = optimizer.get_params()["a"]
        optimizer.apply_gradients({"a": big["a"], "b": None, "c": None})
        moved = np.abs(optimizer.get_params()["a"] - before).max()
        assert 0 < moved < 0.05, "the rate is that of the fourth round, not of its first step"


def test_the_list_of_weights_is_refused_where_it_cannot_hold_the_clocks() -> None:
    with DistNadam(clocks="tensor", backend="local").build(params()) as optimizer:
        optimizer.apply_gradients(gradients(0))
        weights = optimizer.get_weights()
        optimizer.apply_gradients(gradients(1, lacked=("b",)))
        with pytest.raises(ConfigError, match=r"get_weights: 'b' was stepped 1 times, .* 2 times"):
            optimizer.get_weights()
        optimizer.set_weights(weights)
        assert {clock.steps for clock in clocks_of(optimizer)} == {1}
        assert [x.tobytes() for x in optimizer.get_weights()] == [x.tobytes() for x in weights]


OWN = [Group("a", beta_1=0.5, beta_2=0.9), Group("b", beta_2=0.99), Group("c", lr_scale=2.0)]


@pytest.mark.parametrize("formula", ["nadam", "nadam_optax", "adam_keras"])
@pytest.mark.parametrize(("kernel", "num_shards"), [("numpy", 1), ("fused", 3)])
def test_groups_step_by_betas_of_their_own_as_an_optimizer_with_these(
    formula: Any, kernel: Any, num_shards: int, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"formula": formula, "backend": "local"}
    options = Options(kernel=kernel)
    with DistNadam(groups=OWN, num_shards=num_shards, options=options, **common).build(
        params()
    ) as optimizer:
        for step in range(3):
            optimizer.apply_gradients(gradients(step))
        optimizer.save(tmp_path)
        config = optimizer.get_config()
    assert config["groups"][0] == {"pattern": "a", "beta_1": 0.5, "beta_2": 0.9}
    assert DistNadam.from_config(config).get_config() == config
    with DistNadam.restore(tmp_path, num_shards=2, backend="local") as optimizer:
        optimizer.apply_gradients(gradients(3))
        own = {"a": {"beta_1": 0.5, "beta_2": 0.9}, "b": {"beta_2": 0.99}, "c": {"lr": 0.004}}
        for name, clock in zip(NAMES, clocks_of(optimizer), strict=True):
            with DistNadam(**common, **own[name]).build({name: params()[name]}) as alone:
                for step in range(4):
                    alone.apply_gradients({name: gradients(step)[name]})
                now, then = optimizer.get_params()[name], alone.get_params()[name]
                assert now.tobytes() == then.tobytes()
                if formula == "nadam":
                    assert clock == TensorClock(*map(float, alone.get_weights()[:2]))


def test_betas_of_a_group_change_between_two_steps_and_its_product_goes_on() -> None:
    with (
        DistNadam(groups=[Group("a")], backend="local").build(params()) as optimizer,
        DistNadam(backend="local").build({"a": params()["a"]}) as alone,
    ):
        for step, beta in enumerate((0.9, 0.9, 0.5, 0.5, 0.8)):
            if step:
                optimizer.set_config(groups=[Group("a", beta_1=None if beta == 0.9 else beta)])
                alone.set_config(beta_1=beta)
            optimizer.apply_gradients(gradients(step))
            alone.apply_gradients({"a": gradients(step)["a"]})
        assert optimizer.get_params()["a"].tobytes() == alone.get_params()["a"].tobytes()
        with pytest.raises(ConfigError, match="get_weights: 'a' was stepped 5 times"):
            optimizer.get_weights()
        optimizer.set_config(groups=[Group("a")])
        optimizer.apply_gradients(gradients(5))
        assert clocks_of(optimizer)[0] != clocks_of(optimizer)[1], "the products differ for ever"
        with pytest.raises(ConfigError, match=r"group 'a': beta_2 must be in \[0, 1\), got 1"):
            optimizer.set_config(groups=[Group("a", beta_2=1.0)])
        with pytest.raises(ConfigError, match="clocks='tensor' cannot be changed"):
            optimizer.set_config(clocks="tensor")


def test_betas_of_one_step_are_those_of_tensors_whose_group_has_none() -> None:
    with (
        DistAdam(groups=OWN, backend="local").build(params()) as optimizer,
        DistAdam(beta_1=0.6, beta_2=0.7, groups=OWN, backend="local").build(params()) as expected,
    ):
        optimizer.apply_gradients(gradients(0), betas=(0.6, 0.7))
        expected.apply_gradients(gradients(0))
        assert [held(optimizer, n)[0] for n in NAMES] == [held(expected, n)[0] for n in NAMES]


def saved(root: Path, **config: Any) -> Path:
    with DistNadam(backend="local", **config).build(params()) as optimizer:
        for step, lacked in enumerate(LACKED[:3] if config else [()]):
            optimizer.apply_gradients(gradients(step, lacked=lacked))
        return Path(optimizer.save(root))


def test_a_checkpoint_is_of_the_second_version_only_where_clocks_differ(tmp_path: Path) -> None:
    for config, version in (({}, 1), ({"clocks": "tensor"}, 2)):
        path = saved(tmp_path / str(version), **config)
        envelope = msgpack.unpackb((path / store.MANIFEST).read_bytes())
        body = msgpack.unpackb(envelope["body"])
        assert (envelope["version"], "clocks" in body) == (version, version == 2)
    assert body["clocks"]["index"] == [0, 1, 2]
    assert [steps for steps, _ in body["clocks"]["table"]] == [1, 3, 2]
    assert body["iterations"] == 3
    found = describe(path, store.find(path)[1])
    assert [tensor["steps"] for tensor in found["tensors"]] == [1, 3, 2]
    other = saved(tmp_path / "other", clocks="tensor", groups=[Group("a", beta_1=0.5)])
    assert "clock['a']" in compare(path, other).settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(index=[0, 1], table=c["table"][:2]),
            "clocks are of 2 tensors, its layout has 3",
        ),
        (lambda c: c.update(index=[0, 1, 3]), "no list of places in a table of 3"),
        (lambda c: c.update(index=[0, -1, 1]), "no list of places"),
        (lambda c: c.update(index=[1, 0, 2]), "contradict each other"),
        (lambda c: c["table"][0].__setitem__(0, -1), "a clock is -1"),
        (lambda c: c["table"][0].__setitem__(0, True), "a clock is True"),
        (lambda c: c["table"][0].__setitem__(1, 1.5), r"product of momentum coefficients is 1\.5"),
        (lambda c: c["table"][0].__setitem__(1, float("nan")), "coefficients is nan"),
        (lambda c: c.pop("table"), "expected a table and an index"),
        (lambda c: c.clear(), "expected a table and an index"),
    ],
)
def test_clocks_that_cannot_be_are_refused(
    change: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    raw = (saved(tmp_path, clocks="tensor") / store.MANIFEST).read_bytes()
    envelope = msgpack.unpackb(raw)
    body = msgpack.unpackb(envelope["body"], strict_map_key=False)
    change(body["clocks"])
    packed = msgpack.packb(body)
    envelope |= {"body": packed, "checksum": xxhash.xxh3_128_hexdigest(packed)}
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_bytes(msgpack.packb(envelope), "here")


def test_equal_clocks_have_one_place_in_the_order_of_tensors() -> None:
    clocks = TensorClocks.of([TensorClock(2, 0.5), TensorClock(), TensorClock(2, 0.5)])
    assert clocks == TensorClocks((TensorClock(2, 0.5), TensorClock()), (0, 1, 0))
    assert TensorClocks.from_dict(clocks.to_dict()) == clocks
    assert Clock(3, 0.25).of_tensor(7) == TensorClock(3, 0.25)
