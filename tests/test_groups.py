"""Groups of tensors: which tensors a pattern takes, and that each steps by its own settings."""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistNadam, Group, Options
from distnadam.checkpoint import store
from distnadam.errors import ConfigError, NonFiniteGradient, StructureError
from distnadam.groups import groups_of
from distnadam.schedules import Constant, Schedule, WarmupCosine
from tests.models import bits, leaves

PATHS = ["encoder/0/kernel", "encoder/0/bias", "encoder/1/bias", "head.bias", "bias", "module.x.w"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["**/bias"], [-1, 0, 0, 0, 0, -1]),
        (["*/bias", "**"], [1, 1, 1, 0, 1, 1]),
        (["encoder/**", "**/bias"], [0, 0, 0, 1, 1, -1]),
        (["encoder/*/b*s"], [-1, 0, 0, -1, -1, -1]),
        (["encoder.0.*"], [0, 0, -1, -1, -1, -1]),
        (["x/w", "module._orig_mod.head.bias"], [-1, -1, -1, 1, -1, 0]),
        (["bias"], [-1, -1, -1, -1, 0, -1]),
        (["**/0/**/kernel"], [0, -1, -1, -1, -1, -1]),
    ],
)
def test_the_first_pattern_that_matches_a_path_takes_it(
    patterns: list[str], expected: list[int]
) -> None:
    assert groups_of([Group(pattern) for pattern in patterns], PATHS) == expected


def test_nothing_but_stars_is_special_in_a_pattern() -> None:
    paths = ["a[0]", "a0", "b?c", "bxc", "(w|v)"]
    assert groups_of([Group("a[0]"), Group("b?c"), Group("(w|v)")], paths) == [0, -1, 1, -1, 2]


def test_only_names_with_dots_are_taken_for_torchs_and_lose_its_wrappers() -> None:
    paths = ["module/kernel", "head/kernel", "module.module.a.w", "a._orig_mod.b", "module"]
    groups = [Group("module/**"), Group("a.w"), Group("a/b")]
    assert groups_of(groups, paths) == [0, -1, 1, 2, 0]


def test_a_pattern_without_a_tensor_is_refused_with_paths_near_it() -> None:
    with pytest.raises(ConfigError, match=r"group 'encoder/0/biases' matches no tensor; near it"):
        groups_of([Group("encoder/0/biases")], PATHS)
    message = "group 'head/*' matches only tensors that groups before it take, as 'head.bias'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        groups_of([Group("**/bias"), Group("head/*")], PATHS)
    optimizer = DistNadam(groups=[Group("b")], backend="local")
    with pytest.raises(ConfigError, match="group 'b' matches no tensor; near it are 'w'"):
        optimizer.build({"w": np.zeros(3)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": ""}, "a group's pattern must be a path such as '**/bias', got ''"),
        ({"pattern": 3}, "a group's pattern must be a path such as '**/bias', got 3"),
        ({"pattern": "a**/b"}, "group 'a**/b': ** stands for whole segments, got 'a**'"),
        ({"lr_scale": -1}, "group 'w': lr_scale must be finite and at least 0, got -1"),
        ({"lr": "0.1"}, "group 'w': lr must be a number, got '0.1'"),
        ({"lr": lambda step: 0.1}, "group 'w': lr must be a number or a Schedule, got <function"),
        ({"lr": 0.1, "lr_scale": 0.5}, "group 'w': lr_scale=0.5 and lr=0.1 cannot both be set"),
        ({"weight_decay": float("nan")}, "group 'w': weight_decay must be finite"),
        ({"trainable": None}, "group 'w': trainable must be True or False, got None"),
    ],
)
def test_a_bad_setting_of_a_group_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Group(**{"pattern": "w", **arguments})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("w", "groups must be a list of Group, got 'w'"),
        (3, "groups must be a list of Group, got 3"),
        (["w"], "groups: expected Group(pattern, ...), got 'w'"),
        ([{"pattern": "w", "momentum": 0.9}], "groups: a group has no setting 'momentum'"),
    ],
)
def test_what_are_no_groups_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DistNadam(groups=groups)


def test_a_groups_clipnorm_and_a_global_one_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"global_clipnorm=1.0 and the clipnorm of Group\('w'"):
        DistNadam(global_clipnorm=1.0, groups=[Group("w", clipnorm=2.0)])


def params() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "a": {"kernel": rng.standard_normal((40, 60), np.float32), "bias": np.ones(60, np.float32)},
        "b": {"kernel": rng.standard_normal((60, 30), np.float32), "bias": np.ones(30, np.float16)},
        "c": rng.standard_normal(3000),
    }


def gradients(step: int, rank: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng([step, rank])
    return {
        "a": {
            "kernel": rng.standard_normal((40, 60), np.float32),
            "bias": rng.standard_normal(60, np.float32),
        },
        "b": {
            "kernel": rng.standard_normal((60, 30), np.float32),
            "bias": rng.standard_normal(30).astype(np.float16),
        },
        "c": rng.standard_normal(3000),
    }


def tensors(tree: Any) -> dict[str, Any]:
    return {
        "a/kernel": tree["a"]["kernel"],
        "a/bias": tree["a"]["bias"],
        "b/kernel": tree["b"]["kernel"],
        "b/bias": tree["b"]["bias"],
        "c": tree["c"],
    }


OWN = st.fixed_dictionaries(
    {},
    optional={
        "epsilon": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.2]),
        "clipnorm": st.sampled_from([0.5, 3.0]),
        "clipvalue": st.sampled_from([0.01, 1.0]),
    },
)
RATES = st.sampled_from([{}, {"lr_scale": 0.1}, {"lr": 0.05}, {"lr": WarmupCosine(0.1, 2, 9)}])


@settings(max_examples=40)
@given(
    formula=st.sampled_from(["nadam", "adam", "adam_keras"]),
    coupled=st.booleans(),
    maximize=st.booleans(),
    num_shards=st.integers(1, 6),
    kernel=st.sampled_from(["numpy", "fused"]),
    own=st.tuples(OWN, OWN),
    rates=st.tuples(RATES, RATES),
    base=OWN,
)
def test_each_tensor_steps_as_under_an_optimizer_with_its_groups_settings(
    formula: Any,
    coupled: bool,
    maximize: bool,
    num_shards: int,
    kernel: Any,
    own: tuple[dict[str, Any], dict[str, Any]],
    rates: tuple[dict[str, Any], dict[str, Any]],
    base: dict[str, Any],
) -> None:
    common = {"formula": formula, "decoupled_weight_decay": not coupled, "maximize": maximize}
    common |= {"lr": 0.01, "backend": "local", "options": Options(kernel=kernel, threads=2)} | base
    groups = [Group("**/bias", **own[0], **rates[0]), Group("b/**", **own[1], **rates[1])]
    of = {"a/kernel": 2, "a/bias": 0, "b/kernel": 1, "b/bias": 0, "c": 2}
    with DistNadam(**common, groups=groups, num_shards=num_shards).build(params()) as optimizer:
        for step in range(4):
            optimizer.apply_gradients(gradients(step))
        found = tensors(optimizer.get_params())
    for path, number in of.items():
        rate = (*rates, {})[number]
        alone = {"lr": rate["lr"]} if "lr" in rate else {"lr": 0.01 * rate.get("lr_scale", 1.0)}
        with DistNadam(**{**common, **(*own, {})[number], **alone}).build(
            {"w": tensors(params())[path]}
        ) as optimizer:
            for step in range(4):
                optimizer.apply_gradients({"w": tensors(gradients(step))[path]})
            expected = optimizer.get_params()["w"]
        assert found[path].tobytes() == expected.tobytes(), path


FROZEN = [Group("a/**", trainable=False), Group("**/bias", lr_scale=0.1)]


def without_a(tree: dict[str, Any], leaf: Any) -> dict[str, Any]:
    return {**tree, "a": {"kernel": leaf, "bias": leaf}}


@pytest.mark.on_ray("ray-3-None")
@pytest.mark.parametrize("pull_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_frozen_tensors_stay_and_the_others_step_as_without_them(
    num_shards: int, pull_dtype: Any, backend: str
) -> None:
    shape = {"num_shards": num_shards, "pull_dtype": pull_dtype, "num_workers": 2}
    rest = {key: value for key, value in params().items() if key != "a"}
    with (
        DistNadam(**shape, backend=backend, groups=FROZEN).build(params()) as optimizer,
        DistNadam(**shape, backend="local", groups=FROZEN[1:]).build(rest) as other,
    ):
        workers, others = ([o.worker(rank) for rank in range(2)] for o in (optimizer, other))
        for step in range(4):
            given = [gradients(step, rank) for rank in range(2)]
            for worker, tree in zip(workers, given, strict=True):
                worker.push(without_a(tree, None))
            for worker, tree in zip(others, given, strict=True):
                worker.push({key: value for key, value in tree.items() if key != "a"})
            seen, expected = workers[0].pull(), others[0].pull()
            rest = {key: value for key, value in seen.items() if key != "a"}
            assert [x.tobytes() for x in leaves(rest)] == [x.tobytes() for x in leaves(expected)]
            now = optimizer.get_params()["a"]
            assert all(now[k].tobytes() == v.tobytes() for k, v in params()["a"].items())
            rounded = now["kernel"].astype(seen["a"]["kernel"].dtype)
            assert seen["a"]["kernel"].tobytes() == rounded.tobytes()


@pytest.mark.parametrize("leaf", [None, "nan"])
@pytest.mark.parametrize("how", ["apply_gradients", "step", "views", "push_tensor", "accumulate"])
def test_a_frozen_tensors_gradient_is_not_looked_at(leaf: Any, how: str) -> None:
    tree = gradients(0)
    bad = {key: np.full_like(value, np.nan) for key, value in tree["a"].items()}
    given = without_a(tree, None) if leaf is None else {**tree, "a": bad}
    big = {"large": np.ones(200_000, np.float32)}
    with DistNadam(backend="local", groups=FROZEN).build(params() | big) as optimizer:
        worker = optimizer.worker(0)
        given |= big
        if how == "apply_gradients":
            optimizer.apply_gradients(given)
        elif how == "step":
            worker.step(given)
        elif how == "accumulate":
            worker.accumulate(given)
            worker.accumulate(given)
            worker.step()
        elif how == "views":
            views = worker.gradients()
            views["large"][...] = 1
            for path, view in tensors(views).items():
                view[...] = np.nan if path.startswith("a/") else tensors(tree)[path]
            worker.step()
        else:
            for path, gradient in (tensors(tree) | big).items():
                if path.startswith("a/"):
                    with pytest.raises(StructureError, match=f"'{path}' is frozen"):
                        worker.push_tensor(path, gradient)
                else:
                    worker.push_tensor(path, gradient)
            worker.step()
        assert optimizer.iterations == 1
        now = optimizer.get_params()
        assert now["a"]["kernel"].tobytes() == params()["a"]["kernel"].tobytes()
        with pytest.raises(NonFiniteGradient, match="'c' is not finite"):
            optimizer.apply_gradients({**given, "c": np.full(3000, np.nan)})
        with pytest.raises(StructureError, match="'c'"):
            optimizer.apply_gradients({**given, "c": None})


def test_frozen_tensors_can_be_replaced_and_every_buffer_then_holds_them(tmp_path: Path) -> None:
    with DistNadam(backend="local", num_shards=2, groups=FROZEN).build(params()) as optimizer:
        worker = optimizer.worker(0)
        for number in range(1, 4):
            changed = params()
            changed["a"]["kernel"] += number
            optimizer.set_params(changed)
            worker.pull()
            worker.pull()
            for step in range(3):
                seen = worker.step(without_a(gradients(step), None))
                assert seen["a"]["kernel"].tobytes() == changed["a"]["kernel"].tobytes()
        optimizer.reshard(3)
        seen = worker.step(without_a(gradients(9), None))
        assert seen["a"]["kernel"].tobytes() == changed["a"]["kernel"].tobytes()
        before = optimizer.get_params()
        optimizer.save(tmp_path)
    with DistNadam.restore(tmp_path, num_shards=1, backend="local") as optimizer:
        assert optimizer.get_config()["groups"] == [group.to_dict() for group in FROZEN]
        optimizer.apply_gradients(without_a(gradients(10), None))
        now = optimizer.get_params()
        assert now["a"]["kernel"].tobytes() == before["a"]["kernel"].tobytes()
        assert now["c"].tobytes() != before["c"].tobytes()


def test_groups_are_plain_data_in_the_config_and_come_back() -> None:
    groups = [Group("b", lr=Constant(0.1), clipnorm=1.0), Group("w", lr_scale=0.5, trainable=False)]
    config = DistNadam(groups=groups).get_config()
    again = DistNadam.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert config["groups"][1] == {"pattern": "w", "lr_scale": 0.5, "trainable": False}


@dataclass(frozen=True)
class Breaking(Schedule):
    """A rate that cannot be after some steps."""

    last: int

    def __call__(self, step: int) -> float:
        return 0.1 if step <= self.last else -1.0


def test_a_rate_that_cannot_be_names_its_group_and_nothing_steps() -> None:
    one = {"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)}
    for groups, message in (
        ([Group("w", lr=Breaking(0))], "group 'w': lr at step 1 must be finite and at least 0"),
        ([Group("w", lr_scale=1e200)], "group 'w': lr at step 1 must be finite and at least 0"),
    ):
        with DistNadam(backend="local", groups=groups).build(one) as optimizer:
            optimizer.apply_gradients(one)
            before = bits(optimizer)
            optimizer.lr = 1e200
            with pytest.raises(ConfigError, match=re.escape(message)):
                optimizer.apply_gradients(one)
            assert bits(optimizer) == before


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_threads_take_each_part_with_its_setting_and_its_factor(
    kernel: Any, half: bool, maximize: bool
) -> None:
    """Of a model with work for several threads, clipped by norm in some of the rounds."""
    rng = np.random.default_rng(3)
    tree = {
        f"{i}": {
            "kernel": rng.standard_normal(90_000 + 7 * i, np.float32),
            "bias": rng.standard_normal(300 + i, np.float32),
        }
        for i in range(9)
    }
    groups = [
        Group("**/bias", weight_decay=0.0, clipnorm=30.0),
        Group("3/*", lr_scale=0.1),
        Group("5/*", trainable=False),
    ]
    found = []
    for threads, num_shards, way in ((1, 1, "numpy"), (3, 1, kernel), (2, 2, kernel)):
        with DistNadam(
            backend="local",
            num_shards=num_shards,
            clipnorm=300.0,
            weight_decay=0.1,
            maximize=maximize,
            groups=groups,
            options=Options(kernel=way, threads=threads),
        ).build(tree) as optimizer:
            for size in (0.5, 2.0, 0.5, 2.0):
                gradient = optree.tree_map(partial(np.multiply, np.float32(size)), tree)
                if half:
                    gradient = optree.tree_map(lambda x: x.astype(np.float16), gradient)
                optimizer.apply_gradients(gradient)
            found.append(bits(optimizer))
    assert found[0] == found[1] == found[2]


def test_a_checkpoint_of_the_default_formula_has_nothing_that_earlier_readers_refuse(
    tmp_path: Path,
) -> None:
    with DistNadam(backend="local").build({"w": np.ones(3)}) as optimizer:
        directory, manifest, _ = store.find(optimizer.save(tmp_path))
    body = msgpack.unpackb(msgpack.unpackb(directory.read(store.MANIFEST, 1 << 26))["body"])
    assert "pull_dtype" in body["config"]
    assert not {"formula", "groups", "weight_decay", "use_ema"} & set(body["config"])
    assert manifest.config["formula"] == "nadam"


def test_gradients_of_a_loss_may_lack_those_of_frozen_tensors() -> None:
    tree = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    given = {"a": None, "b": np.full(2, 0.5, np.float32)}
    frozen = [Group("a", trainable=False)]
    with DistNadam(backend="local", groups=frozen).build(tree) as optimizer:
        found = optimizer.get_gradients(lambda params: (0.0, given), tree)
        assert [x.tolist() for x in found] == [[0.0] * 3, [0.5] * 2]
        assert optimizer.get_updates(lambda params: (0.0, given), tree).result() == 1
        now = optimizer.get_params()
        assert now["a"].tolist() == [1.0] * 3
        assert (now["b"] < 1).all()
