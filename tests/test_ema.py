"""The average of the parameters: the formula to the bit, and what leaves it, begins it or carries
it.
"""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from distnadam import DistNadam, Group, Options
from distnadam.checkpoint import store
from distnadam.checkpoint.diff import compare
from distnadam.checkpoint.inspect import describe
from distnadam.checkpoint.shard_file import verify_files
from distnadam.errors import CheckpointError, ConfigError, NonFiniteGradient, StructureError
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_files import ShardFiles
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import STATE_ARRAYS, Flat
from tests.eventually import eventually
from tests.models import bits, gradients, leaves, params, run

MOMENTUM = 0.9
FROZEN = [Group("dense/kernel", trainable=False), Group("layers/1/*", lr_scale=0.5)]


def held(optimizer: DistNadam) -> tuple[Clock, dict[str, Flat]]:
    """The clock, and the arrays in the dtypes in which they are kept."""
    return optimizer.shards.read(("params", "m", "v", "ema"))


def as_bytes(flat: Flat) -> dict[str, bytes]:
    return {space: values.tobytes() for space, values in flat.items()}


def tree_bytes(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in leaves(tree)]


def stepped_without_average(
    clock: Clock, before: dict[str, Flat], number: int, **config: Any
) -> Flat:
    """The parameters that one step leads to where no average is kept."""
    with DistNadam(backend="local", options=Options(kernel="numpy"), **config).build(
        params()
    ) as twin:
        twin.shards.fill({name: before[name] for name in STATE_ARRAYS}, clock)
        twin.apply_gradients(gradients(number, 0))
        return twin.shards.read(("params",))[1]["params"]


@settings(max_examples=30)
@given(
    num_shards=st.integers(1, 5),
    kernel=st.sampled_from(["numpy", "fused"]),
    threads=st.integers(1, 3),
    momentum=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    every=st.sampled_from([None, 1, 2, 3]),
    config=st.fixed_dictionaries(
        {},
        optional={
            "pull_dtype": st.just("bfloat16"),
            "groups": st.just(FROZEN),
            "clipnorm": st.just(0.7),
            "formula": st.just("adam"),
        },
    ),
    by_worker=st.booleans(),
)
def test_it_is_the_formula_in_plain_numpy_to_the_bit(
    num_shards: int,
    kernel: Any,
    threads: int,
    momentum: float,
    every: int | None,
    config: dict[str, Any],
    by_worker: bool,
) -> None:
    average = {"use_ema": True, "ema_momentum": momentum, "ema_overwrite_frequency": every}
    with DistNadam(
        num_shards=num_shards,
        backend="local",
        options=Options(kernel=kernel, threads=threads),
        **average,
        **config,
    ).build(params()) as optimizer:
        worker = optimizer.worker(0) if by_worker else None
        for number in range(1, 5):
            clock, before = held(optimizer)
            expected = stepped_without_average(clock, before, number, **config)
            if worker is None:
                optimizer.apply_gradients(gradients(number, 0))
            else:
                seen = worker.step(gradients(number, 0))
            (_, now), ema = held(optimizer), {}
            for space, p in expected.items():
                old = np.dtype(space).type(momentum)
                new = np.dtype(space).type(1) - old
                ema[space] = old * before["ema"][space] + new * p if number > 1 else p.copy()
            for tensor in optimizer.shards.layout.tensors:
                if "groups" in config and tensor.path == "dense/kernel":
                    part = slice(tensor.begin, tensor.end)
                    ema["float32"][part] = before["params"]["float32"][part]
            assert as_bytes(now["ema"]) == as_bytes(ema)
            overwritten = every is not None and number % every == 0
            assert as_bytes(now["params"]) == as_bytes(ema if overwritten else expected)
            assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(
                optimizer.shards.layout.tree(ema)
            )
            if worker is not None:
                views = optimizer.shards.layout.views(now["params"])
                is_rounded = "pull_dtype" in config
                assert tree_bytes(seen) == [
                    (
                        view.astype(ml_dtypes.bfloat16)
                        if is_rounded and view.dtype == np.float32
                        else view.astype(np.asarray(leaf).dtype)
                    ).tobytes()
                    for view, leaf in zip(views, leaves(seen), strict=True)
                ]


def test_it_is_the_parameters_until_a_step_and_what_that_leads_to_then() -> None:
    with DistNadam(num_shards=2, backend="local", use_ema=True).build(params()) as optimizer:
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(params())
        optimizer.set_params(params(seed=1))
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(params())
        optimizer.apply_gradients(gradients(0, 0))
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(optimizer.get_params())
        optimizer.get_ema_params()["dense"]["kernel"][:] = 9  # a copy
        assert optimizer.get_ema_params()["half"].dtype == np.float16
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(optimizer.get_params())


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_round_without_a_step_leaves_it_and_is_not_counted(on_nonfinite: Any) -> None:
    bad = gradients(9, 0)
    bad["layers"][0][7] = np.nan
    ends = []
    for rounds in ([0, 1, 2, 3], [0, None, 1, None, None, 2, 3]):
        with DistNadam(
            backend="local",
            num_shards=3,
            use_ema=True,
            ema_momentum=MOMENTUM,
            ema_overwrite_frequency=3,
            options=Options(on_nonfinite=on_nonfinite),
        ).build(params()) as optimizer:
            for number in rounds:
                before = bits(optimizer)
                if number is not None:
                    optimizer.apply_gradients(gradients(number, 0))
                elif on_nonfinite == "skip":
                    optimizer.apply_gradients(bad)
                else:
                    with pytest.raises(NonFiniteGradient):
                        optimizer.apply_gradients(bad)
                assert (bits(optimizer) == before) == (number is None)
            ends.append(bits(optimizer))
    assert ends[0] == ends[1]


def test_what_replaces_the_state_leaves_it_and_it_can_be_replaced_itself() -> None:
    with DistNadam(num_shards=3, backend="local", use_ema=True, groups=FROZEN).build(
        params()
    ) as optimizer:
        for number in range(3):
            optimizer.apply_gradients(gradients(number, 0))
        before = optimizer.get_ema_params()
        optimizer.set_weights(optimizer.get_weights())
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(before)

        other = params(seed=1)
        optimizer.set_params(other)
        before["dense"]["kernel"] = other["dense"]["kernel"]  # is frozen: the average is it
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(before)

        optimizer.set_ema_params(params(seed=2))
        expected = params(seed=2)
        expected["dense"]["kernel"] = other["dense"]["kernel"]
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(expected)
        assert tree_bytes(optimizer.get_params()) == tree_bytes(other)

        optimizer.set_ema_params(optimizer.get_params())
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(other)
        with pytest.raises(StructureError, match="average: 'half' is missing"):
            optimizer.set_ema_params({k: v for k, v in other.items() if k != "half"})
        other["half"][3] = np.nan
        with pytest.raises(StructureError, match="average: 'half': expected finite values"):
            optimizer.set_ema_params(other)


def test_a_clock_set_to_0_has_the_next_step_begin_it() -> None:
    with DistNadam(backend="local", use_ema=True).build(params()) as optimizer:
        optimizer.apply_gradients(gradients(0, 0))
        optimizer.apply_gradients(gradients(1, 0))
        weights = optimizer.get_weights()
        optimizer.set_weights([np.int64(0), np.float64(1), *weights[2:]])
        optimizer.apply_gradients(gradients(2, 0))
        assert tree_bytes(optimizer.get_ema_params()) == tree_bytes(optimizer.get_params())


CONFIG: dict[str, Any] = {
    "use_ema": True,
    "ema_momentum": MOMENTUM,
    "ema_overwrite_frequency": 4,
    "groups": FROZEN,
    "pull_dtype": "bfloat16",
}


def undisturbed(steps: int) -> list[bytes]:
    with DistNadam(backend="local", num_workers=2, **CONFIG).build(params()) as optimizer:
        run(optimizer, 0, steps)
        return bits(optimizer)


@pytest.mark.on_ray("ray-True", slow=["ray-False"])
@pytest.mark.parametrize("wait", [True, False])
def test_checkpoints_reshards_and_restores_carry_it(
    wait: bool, backend: str, tmp_path: Path
) -> None:
    with DistNadam(backend=backend, num_shards=3, num_workers=2, **CONFIG).build(
        params()
    ) as optimizer:
        optimizer.reserve()
        run(optimizer, 0, 3)
        saved = optimizer.save(tmp_path, wait=wait)
        optimizer.reshard(5)
        run(optimizer, 3, 4)
        optimizer.reshard(1)
        run(optimizer, 4, 6)
        assert bits(optimizer) == undisturbed(6)
        path = Path(saved if isinstance(saved, str) else saved.result())
    for num_shards in (1, 4):
        with DistNadam.restore(path, num_shards=num_shards, backend="local") as optimizer:
            assert optimizer.get_config()["use_ema"] is True
            assert optimizer.get_config()["ema_momentum"] == MOMENTUM
            assert bits(optimizer) == undisturbed(3)
            run(optimizer, 3, 6)
            assert bits(optimizer) == undisturbed(6)


@pytest.mark.slow
def test_a_standby_that_takes_over_has_it(ray_cluster: None) -> None:
    import ray

    with DistNadam(backend="ray", num_shards=2, num_workers=2, replicas=1, **CONFIG).build(
        params()
    ) as optimizer:
        run(optimizer, 0, 3)
        eventually(lambda: optimizer.shards.describe().replicated == 3)
        ray.kill(optimizer.shards.backend.actors[0])  # type: ignore[attr-defined]
        run(optimizer, 3, 6)
        assert bits(optimizer) == undisturbed(6)


def saved(root: Path, **config: Any) -> Path:
    with DistNadam(backend="local", num_shards=2, **config).build(params()) as optimizer:
        optimizer.apply_gradients(gradients(0, 0))
        return Path(optimizer.save(root))


def names_in(checkpoint: Path) -> set[tuple[str, ...]]:
    found = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            found.add(tuple(sorted(opened.keys())))
    return found


def test_a_checkpoints_files_hold_it_where_it_is_kept_and_nothing_of_it_elsewhere(
    tmp_path: Path,
) -> None:
    without, with_average = saved(tmp_path / "a"), saved(tmp_path / "b", use_ema=True)
    plain = tuple(f"{array}.{space}" for array in "mv" for space in ("float32", "float64"))
    plain += ("params.float32", "params.float64")
    assert names_in(without) == {tuple(sorted(plain))}
    assert names_in(with_average) == {tuple(sorted((*plain, "ema.float32", "ema.float64")))}
    packed = (without / store.MANIFEST).read_bytes()
    assert not re.search(rb"use_ema|ema_momentum|ema_overwrite", packed), "earlier readers take it"
    manifests = [store.load(path) for path in (without, with_average)]
    for path, manifest in zip((without, with_average), manifests, strict=True):
        verify_files(path, manifest)
    assert manifests[0].config["use_ema"] is False
    one, other = (describe(path, store.load(path)) for path in (without, with_average))
    assert one["arrays"] == ["params", "m", "v"]
    assert other["arrays"] == ["params", "m", "v", "ema"]
    assert 4 * one["sizes"]["state_bytes"] == 3 * other["sizes"]["state_bytes"]
    assert other["sizes"]["file_bytes"] > other["sizes"]["state_bytes"]
    found = compare(without, with_average)
    assert found.settings == {"config.use_ema": (False, True)}
    assert found.tensors == ()


def test_a_diff_finds_the_average_that_differs(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        with DistNadam(backend="local", use_ema=True).build(params()) as optimizer:
            optimizer.apply_gradients(gradients(0, 0))
            if name == "b":
                average = optimizer.get_ema_params()
                average["layers"][0][11] += 1
                optimizer.set_ema_params(average)
            paths.append(optimizer.save(tmp_path / name))
    found = {tensor.path: tensor for tensor in compare(*paths).tensors}
    assert found.keys() == {"layers/0", "half"}, "the half-precision one was rounded on its way"
    assert {tensor.array for tensor in found.values()} == {"ema"}
    assert (found["layers/0"].first_index, found["layers/0"].count) == ((11,), 1)


def test_a_byte_of_the_average_that_is_damaged_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, use_ema=True)
    file = min(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last array is the average
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not have their checksum"):
        DistNadam.restore(path, backend="local")


@pytest.mark.parametrize("kept", [True, False])
def test_a_shard_goes_back_to_a_checkpoint_that_differs_in_whether_it_has_it(
    kept: bool, tmp_path: Path
) -> None:
    """Those of another optimizer of the same tensors, in the same directory."""
    path = saved(tmp_path, use_ema=not kept)
    manifest = store.load(path)
    with DistNadam.restore(path, backend="local", num_shards=1) as optimizer:
        state = optimizer.shards.read(STATE_ARRAYS)[1]
        ranges = optimizer.shards.ranges[0]
    arrays = (*STATE_ARRAYS, "ema") if kept else STATE_ARRAYS
    there = ShardState.empty(ranges, arrays=arrays)
    load = Load(epoch=2, directory=str(path), manifest=manifest.to_bytes())
    ShardFiles(ranges, arrays).load(load, there)
    found = there.arrays()
    assert tuple(found) == arrays
    for name, flat in found.items():
        assert as_bytes(flat) == as_bytes(state["params" if name == "ema" else name])


def test_its_memory_is_counted_and_there_is_none_where_it_is_not_kept() -> None:
    for use_ema, arrays in ((False, STATE_ARRAYS), (True, (*STATE_ARRAYS, "ema"))):
        with DistNadam(backend="local", use_ema=use_ema).build(params()) as optimizer:
            optimizer.reserve()
            (host,) = optimizer.shards.backend.transport.hosts  # type: ignore[attr-defined]
            assert tuple(host.shard.state.arrays()) == arrays
            assert tuple(host.files.snapshots.memory) == arrays
            assert (host.shard.state.ema is None) == (not use_ema)


def test_an_optimizer_without_it_says_how_to_have_it(tmp_path: Path) -> None:
    with DistNadam(backend="local").build(params()) as optimizer:
        for call in (optimizer.get_ema_params, lambda: optimizer.set_ema_params(params())):
            with pytest.raises(ConfigError, match="make it with use_ema=True"):
                call()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_ema": 1}, "use_ema must be True or False, got 1"),
        ({"ema_momentum": 1.5}, "ema_momentum must be in [0, 1], got 1.5"),
        ({"ema_momentum": -0.1}, "ema_momentum must be finite and at least 0, got -0.1"),
        ({"ema_momentum": "x"}, "ema_momentum must be a number, got 'x'"),
        (
            {"ema_overwrite_frequency": 0},
            "ema_overwrite_frequency must be a whole number of at least 1, got 0",
        ),
        (
            {"ema_overwrite_frequency": 2.0},
            "ema_overwrite_frequency must be a whole number of at least 1, got 2.0",
        ),
    ],
)
def test_a_bad_setting_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DistNadam(**{"use_ema": True, **config})


def test_its_settings_come_back_from_the_config() -> None:
    asked = DistNadam(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=7)
    config = asked.get_config()
    assert (config["use_ema"], config["ema_momentum"], config["ema_overwrite_frequency"]) == (
        True,
        0.5,
        7,
    )
    assert DistNadam.from_config(config).get_config() == config
    assert DistNadam().get_config()["use_ema"] is False
