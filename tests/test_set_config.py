"""Hyper-parameters changed between two steps: each step is that of an optimizer made with them,
whatever carries them on, and what cannot change is refused.
"""

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam import DistAdam, DistNadam, Group, Options
from distnadam.checkpoint import store
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import ConfigError, NotOpen
from distnadam.nadam.step_scalars import Clock
from distnadam.schedules import Constant
from distnadam.tensors.arrays import Flat
from tests.eventually import eventually
from tests.models import params, run, run_drifting

W = {"w": np.linspace(-1, 1, 3000, dtype=np.float32)}
ONES = {"w": np.ones(3000, np.float32)}
PATTERNS = ("dense/*", "layers/0", "layers/1/*")
CLIPS = st.sampled_from(
    [
        {"clipnorm": None, "global_clipnorm": None},
        {"clipnorm": 0.1, "global_clipnorm": None},
        {"clipnorm": None, "global_clipnorm": 1.5},
    ]
)
OF_GROUP = st.fixed_dictionaries(
    {},
    optional={
        "lr_scale": st.sampled_from([0.5, 2.0]),
        "epsilon": st.just(1e-3),
        "weight_decay": st.sampled_from([0.0, 0.2]),
        "clipvalue": st.sampled_from([0.0, 0.05]),
    },
)
NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.002, 0.1, Constant(0.05)]),
        "beta_1": st.sampled_from([0.0, 0.5, 0.95]),
        "beta_2": st.sampled_from([0.5, 0.99]),
        "epsilon": st.sampled_from([None, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.3]),
        "clipvalue": st.sampled_from([None, 0.01]),
        "ema_momentum": st.sampled_from([0.0, 0.9]),
        "groups": st.tuples(OF_GROUP, OF_GROUP).map(
            lambda own: [
                Group(PATTERNS[0], **own[0]),
                Group(PATTERNS[1], **own[1]),
                Group(PATTERNS[2], trainable=False),
            ]
        ),
    },
)
CHANGES = st.lists(
    st.tuples(NUMBERS, CLIPS).map(lambda parts: {**parts[0], **parts[1]}), max_size=4
)
BETWEEN = st.lists(st.sampled_from(["", "save", "reshard"]), min_size=4, max_size=4)


def held(optimizer: DistNadam) -> tuple[Clock, dict[str, Flat]]:
    names = (
        ("params", "m", "v", "ema") if optimizer.get_config()["use_ema"] else ("params", "m", "v")
    )
    return optimizer.shards.read(names)


def as_bytes(state: tuple[Clock, dict[str, Flat]]) -> Any:
    clock, arrays = state
    return clock, {
        (name, space): values.tobytes()
        for name, flat in arrays.items()
        for space, values in flat.items()
    }


def stepped(before: tuple[Clock, dict[str, Flat]], step: int, config: dict[str, Any]) -> Any:
    """What one step leads to in an optimizer that was made with these settings."""
    made = config | {"num_shards": 1, "options": Options(kernel="numpy")}
    with DistNadam.from_config(made).build(params()) as twin:
        twin.shards.fill(before[1], before[0])
        run_drifting(twin, step, step + 1)
        return as_bytes(held(twin))


@settings(max_examples=25)
@given(
    changes=CHANGES,
    between=BETWEEN,
    shards=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    kernel=st.sampled_from(["numpy", "fused"]),
    formula=st.sampled_from(
        [{}, {"formula": "adam"}, {"formula": "nadam_optax"}, {"use_ema": True}]
    ),
)
def test_each_step_is_that_of_an_optimizer_made_with_the_present_values(
    changes: list[dict[str, Any]],
    between: list[str],
    shards: list[int],
    kernel: Any,
    formula: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    optimizer = DistNadam(
        num_shards=shards[0],
        num_workers=2,
        backend="local",
        options=Options(kernel=kernel),
        groups=[*map(Group, PATTERNS[:2]), Group(PATTERNS[2], trainable=False)],
        **formula,
    ).build(params())
    try:
        for step, change in enumerate([{}, *changes]):
            optimizer.set_config(**change)
            if step and between[step - 1] == "save":
                path = optimizer.save(tmp_path_factory.mktemp("saved"))
                optimizer.close()
                optimizer = DistNadam.restore(path, backend="local", num_shards=shards[step])
            elif step and between[step - 1] == "reshard":
                optimizer.reshard(shards[step])
            for number in (2 * step, 2 * step + 1):
                before = held(optimizer)
                run_drifting(optimizer, number, number + 1)
                expected = stepped(before, number, optimizer.get_config())
                assert as_bytes(held(optimizer)) == expected
    finally:
        optimizer.close()


@pytest.mark.parametrize("clips", [(None, 1e-3), (1e-3, None)])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_direct_steps_clip_by_norm_from_the_step_on_that_they_are_to(
    clips: tuple[float | None, ...], num_shards: int
) -> None:
    with DistNadam(num_shards=num_shards, backend="local", clipnorm=clips[0]).build(W) as optimizer:
        m: list[float] = []
        for clip in clips:
            optimizer.set_config(clipnorm=clip, beta_1=0.0)  # whose m is the mean gradient
            for _ in range(3):
                optimizer.apply_gradients(ONES)
            m.append(float(np.linalg.norm(held(optimizer)[1]["m"]["float32"])))
        expected = [float(np.sqrt(3000)) if clip is None else clip for clip in clips]
        assert m == pytest.approx(expected, rel=1e-6)


def test_a_push_that_waits_for_norms_is_clipped_before_clipping_ends() -> None:
    options = Options(step_timeout_s=30.0)
    with DistNadam(
        num_shards=2, num_workers=2, backend="local", clipnorm=1e-3, beta_1=0.0, options=options
    ).build(W) as optimizer:
        tickets = [optimizer.worker(rank).push(ONES) for rank in (0, 1)]
        changing = threading.Thread(target=lambda: optimizer.set_config(clipnorm=None, lr=0.5))
        changing.start()
        eventually(lambda: optimizer.shards.describe().holder is not None)
        for ticket in tickets:
            ticket.result()
        changing.join()
        assert float(np.linalg.norm(held(optimizer)[1]["m"]["float32"])) == pytest.approx(1e-3)
        optimizer.apply_gradients(ONES)
        assert float(np.linalg.norm(held(optimizer)[1]["m"]["float32"])) > 50
        assert (optimizer.lr, optimizer.get_config().get("clipnorm")) == (0.5, None)


def test_scheduled_momentum_multiplies_each_steps_own_beta_1() -> None:
    with DistNadam(backend="local", schedule_decay=0.0).build(W) as optimizer:
        product = 1.0
        for beta_1 in (0.9, 0.5, 0.8):
            optimizer.set_config(beta_1=beta_1)
            optimizer.apply_gradients(ONES)
            product *= beta_1 * (1.0 - 0.5)
            assert held(optimizer)[0].m_schedule == product
    with DistAdam(backend="local").build(W) as adam:
        adam.apply_gradients(ONES)
        adam.set_config(beta_1=0.5)
        adam.apply_gradients(ONES)
        assert held(adam)[0].m_schedule == 0.25


def test_a_checkpoint_has_the_values_of_its_round_and_a_handle_those_of_now(tmp_path: Path) -> None:
    with DistNadam(backend="local").build(W) as optimizer:
        saving = optimizer.save(tmp_path, wait=False)
        optimizer.set_config(beta_2=0.5, groups=[], clipvalue=1.0)
        first, optimizer.lr = saving.result(), 0.5
        optimizer.apply_gradients(ONES)
        second = optimizer.save(tmp_path)
    found = [store.load(path).config for path in (first, second)]
    assert [(c["lr"], c["beta_2"], c["clipvalue"]) for c in found] == [
        (0.002, 0.999, None),
        (0.5, 0.5, 1.0),
    ]
    with DistNadam.restore(second, backend="local") as restored:
        config = restored.get_config()
        assert (config["lr"], config["beta_2"], config["clipvalue"]) == (0.5, 0.5, 1.0)


def test_before_it_is_built_and_after_it_is_closed() -> None:
    optimizer = DistNadam(backend="local")
    optimizer.set_config(beta_1=0.5, epsilon=None)
    optimizer.set_config()
    config = optimizer.get_config()
    assert (config["beta_1"], config["epsilon"]) == (0.5, 1e-7)
    optimizer.build(W)
    assert optimizer.get_config() == config
    optimizer.close()
    with pytest.raises(NotOpen):
        optimizer.set_config(beta_1=0.6)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formula": "adam"}, "formula='adam' cannot be changed: the moments and their clock"),
        ({"maximize": True}, "maximize=True cannot be changed: it is part of the formula"),
        ({"decoupled_weight_decay": False}, "decoupled_weight_decay=False cannot be changed"),
        ({"sum_group": 2}, "sum_group=2 cannot be changed: workers and relays sum by it"),
        ({"pull_dtype": "bfloat16"}, "pull_dtype='bfloat16' cannot be changed: shards keep"),
        ({"use_ema": True}, "use_ema=True cannot be changed: shards keep the average's memory"),
        ({"ema_overwrite_frequency": 3}, "ema_overwrite_frequency=3 cannot be changed"),
        ({"num_shards": 2}, r"num_shards=2 cannot be changed: reshard\(num_shards\)"),
        ({"name": "x"}, "name='x' cannot be changed: others find the optimizer by it"),
        ({"options": None}, "options=None cannot be changed: options are given when"),
        ({"step_timeout_s": 1.0}, "step_timeout_s=1.0 cannot be changed: options are given when"),
        ({"learning_rate": 1.0}, "learning_rate=1.0 .*no such setting; did you mean lr"),
        ({"lr": -1}, "lr.*-1"),
        ({"beta_1": 1.0}, r"beta_1 must be in \[0, 1\), got 1.0"),
        ({"ema_momentum": 2.0}, r"ema_momentum must be in \[0, 1\], got 2.0"),
        ({"global_clipnorm": 1.0}, "clipnorm=2.0 and global_clipnorm=1.0 cannot both be set"),
        ({"groups": []}, r"expected 'w' \(frozen\), 'b', got none"),
        (
            {"groups": [Group("b"), Group("w", trainable=False)]},
            r"only values can be changed.*expected 'w' \(frozen\), 'b', got 'b', 'w' \(frozen\)",
        ),
        ({"groups": [Group("w"), Group("b")]}, r"expected 'w' \(frozen\), 'b', got 'w', 'b'"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_name_and_nothing_is_applied(
    values: dict[str, Any], message: str, built: bool
) -> None:
    groups = [Group("w", trainable=False), Group("b")]
    optimizer = DistNadam(backend="local", clipnorm=2.0, groups=groups)
    if built:
        optimizer.build({"w": W["w"], "b": ONES["w"]})
    before = optimizer.get_config()
    with pytest.raises(ConfigError, match=message):
        optimizer.set_config(beta_2=0.5, **values)
    assert optimizer.get_config() == before
    optimizer.close()


def test_a_momentum_schedule_that_the_formula_has_not_stays_refused() -> None:
    with (
        DistNadam(backend="local", formula="adam").build(W) as optimizer,
        pytest.raises(ConfigError, match=r"schedule_decay=0\.5 has no effect with formula='adam'"),
    ):
        optimizer.set_config(schedule_decay=0.5)


@pytest.mark.on_ray
def test_every_handle_and_worker_follows_a_change_on_every_backend(backend: str) -> None:
    name = "changed" if backend == "ray" else None
    replicas = 1 if backend == "ray" else 0
    found = []
    for where, shards in (("local", 1), (backend, 2)):
        is_ray = where == "ray"
        with DistNadam(
            num_shards=shards,
            num_workers=2,
            backend=where,  # type: ignore[arg-type]
            name=name if is_ray else None,
            replicas=replicas if is_ray else 0,
        ).build(params()) as optimizer:
            run(optimizer, 0, 2)
            optimizer.set_config(beta_1=0.5, global_clipnorm=0.5, weight_decay=0.1)
            run(optimizer, 2, 4)
            other = DistNadam.connect("changed") if is_ray else optimizer
            assert other.get_config()["global_clipnorm"] == 0.5
            other.set_config(global_clipnorm=None, lr=Constant(0.05))
            assert optimizer.lr == Constant(0.05)
            optimizer.reshard(3)
            run(optimizer, 4, 6)
            assert optimizer.get_config()["weight_decay"] == 0.1
            found.append(as_bytes(held(optimizer)))
    assert found[0] == found[1]


def all_followed(shards: ShardGroup) -> bool:
    return all(each.replicated is not None for each in shards.describe_all())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_that_is_killed_right_after_a_change_loses_nothing_of_it() -> None:
    """Nothing was saved, so that to go back would lose the change: the standby has followed it."""
    with DistNadam(num_workers=2, backend="local").build(params()) as alone:
        run(alone, 0, 2)
        alone.set_config(beta_1=0.5, global_clipnorm=0.5)
        run(alone, 2, 4)
        expected = as_bytes(held(alone))
    two = DistNadam(num_shards=2, num_workers=2, replicas=1, backend="ray").build(params())
    with two as optimizer:
        shards = optimizer.shards
        run(optimizer, 0, 2)
        eventually(partial(all_followed, shards))
        optimizer.set_config(beta_1=0.5, global_clipnorm=0.5)
        os.kill(shards.backend.addresses[1].pid, signal.SIGKILL)
        run(optimizer, 2, 4)
        assert as_bytes(held(optimizer)) == expected
        recoveries = shards.backend.supervisor.status().recoveries
        assert (recoveries["promoted"], recoveries["rewound"]) == (1, 0)
