"""What an optimizer takes, its checkpoints hold: data as it was given, trees, options."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options
from distnadam.checkpoint import store
from distnadam.errors import ConfigError, StructureError
from distnadam.tensors.containers import MOST_LEVELS

ONE = np.ones(1, np.float32)
RNG = np.random.default_rng(3)


def nested(levels: int, kind: type) -> Any:
    tree: Any = ONE
    for _ in range(levels):
        tree = {"x": tree} if kind is dict else kind([tree])
    return tree


@pytest.mark.parametrize("wait", [True, False])
def test_data_is_kept_as_it_was_in_the_call(tmp_path: Path, wait: bool) -> None:
    place = {"epoch": 0, "seen": [1, 2, 3], "order": np.arange(3)}
    with DistNadam(backend="local").build({"w": ONE}) as optimizer:
        saving = optimizer.save(tmp_path, wait=wait, data={"place": place})
        place["epoch"], place["seen"][:] = 99, [9, 9]  # type: ignore[index]
        place["order"] += 5  # type: ignore[operator]
        path = saving if isinstance(saving, str) else saving.result()
    with DistNadam.restore(path, backend="local") as restored:
        kept = restored.restored_data["place"]
        assert (kept["epoch"], kept["seen"], kept["order"].tolist()) == (0, [1, 2, 3], [0, 1, 2])


def test_data_comes_back_equal_and_can_be_saved_again(tmp_path: Path) -> None:
    data = {
        "rng": RNG.bit_generator.state,
        "python": random.getstate(),
        "seen": np.int64(7),
        "done": np.bool_(True),
        "pair": (1, (2, [3])),
        "by_rank": {0: "a", 1: "b"},
        "file": "\udcff.txt",
    }
    with DistNadam(backend="local").build({"w": ONE}) as optimizer:
        path = optimizer.save(tmp_path / "first", data=data)
    for _ in range(2):
        with DistNadam.restore(path, backend="local") as restored:
            assert restored.restored_data == data
            assert type(restored.restored_data["seen"]) is np.int64
            path = restored.save(tmp_path / "again", data=restored.restored_data)


@pytest.mark.parametrize("data", [{"a": {"b": {1}}}, {"a": {"b": Path("x")}}, [("a", 1)], 5])
@pytest.mark.parametrize("wait", [True, False])
def test_data_that_cannot_be_kept_is_refused_before_a_byte_is_written(
    tmp_path: Path, wait: bool, data: Any
) -> None:
    with DistNadam(backend="local").build({"w": ONE}) as optimizer:
        with pytest.raises(
            ConfigError, match=r"^data(\['a'\]\['b'\]: expected| must be a mapping)"
        ):
            optimizer.save(tmp_path, wait=wait, data=data)
        assert list(tmp_path.iterdir()) == []
        assert optimizer.save(tmp_path)


@pytest.mark.parametrize("data", [{"x": np.zeros(4 << 20)}, {"x": [0] * 500_000}])
def test_data_too_large_for_a_reader_is_refused_in_the_call(tmp_path: Path, data: Any) -> None:
    with DistNadam(backend="local").build({"w": ONE}) as optimizer:
        with pytest.raises(ConfigError, match=r"^data: .* a checkpoint keeps at most"):
            optimizer.save(tmp_path, data=data)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_the_deepest_tree_that_is_built_is_saved_and_restored(tmp_path: Path, kind: type) -> None:
    tree = nested(MOST_LEVELS, kind)
    with DistNadam(backend="local").build(tree) as optimizer:
        path = optimizer.save(tmp_path)
    with DistNadam.restore(path, backend="local") as restored:
        assert restored.get_params() == tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (nested(MOST_LEVELS + 1, dict), f"at most {MOST_LEVELS} levels"),
        (nested(400, list), f"at most {MOST_LEVELS} levels"),
        (nested(5000, tuple), f"at most {MOST_LEVELS} levels"),
        ({"a": {2**70: ONE}}, "params: 'a/0x40*': expected an int of at most 64 bits"),
        ({-(2**63) - 1: ONE}, "an int of at most 64 bits"),
        ({10**5000: ONE}, "an int of at most 64 bits"),
        ({"a": {"\udcff": ONE}}, r"params: 'a/\\udcff': expected a key that UTF-8 can say"),
        ({"x" * (16 << 20): ONE}, "1 tensors: .* a checkpoint keeps at most"),
    ],
    ids=["101 levels", "400", "5000", "2**70", "-2**63-1", "10**5000", "surrogate", "long"],
)
def test_a_tree_that_no_checkpoint_holds_is_refused_by_build(tree: Any, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        DistNadam(backend="local").build(tree)


@pytest.mark.parametrize("key", [2**64 - 1, -(2**63), True, "", "名", "a b/~\n"], ids=repr)
def test_an_odd_key_that_is_built_is_saved_and_restored(tmp_path: Path, key: Any) -> None:
    with DistNadam(backend="local").build({key: ONE}) as optimizer:
        path = optimizer.save(tmp_path)
    with DistNadam.restore(path, backend="local") as restored:
        assert restored.get_params() == {key: ONE}


def test_large_options_and_odd_text_come_back(tmp_path: Path) -> None:
    options = Options(
        shard_memory_bytes=2**62,
        label_selector={"zone": "\udcff"},
        checkpoint_dir=tmp_path / "\udcff",  # type: ignore[arg-type]
    )
    with DistNadam(backend="local", options=options).build({"w": ONE}) as optimizer:
        path = optimizer.save(tmp_path)
    assert store.load(path).saved_options == options
    with DistNadam.restore(path, backend="local") as restored:
        assert restored.options == options


def test_a_tree_nested_without_end_is_refused_wherever_it_is_given() -> None:
    endless: dict[str, Any] = {"w": ONE}
    endless["self"] = endless
    with DistNadam(backend="local").build({"w": ONE}) as optimizer:
        for tree in (endless, nested(5000, dict)):
            for refuse in (
                DistNadam(backend="local").build,
                optimizer.apply_gradients,
                optimizer.set_params,
                optimizer.worker(0).push,
            ):
                with pytest.raises(StructureError, match=r"(levels of|nested deeper)"):
                    refuse(tree)
