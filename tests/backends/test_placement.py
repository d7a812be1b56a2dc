"""Which node each of several actors goes to: in turn, as room and labels allow, and away from another where that can be."""

from collections import Counter
from typing import Any

import pytest

from distnadam.backends.placement import at

ID = "ray.io/node-id"


def node(name: str, *, alive: bool = True, label: str = "", **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 8.0, **resources}, "Labels": {"ray.io/node-id": name, "kind": label}}


def chosen(index: int, nodes: list[dict[str, Any]], ask: dict[str, float] | None = None, **how: Any) -> str:
    """The node that is asked for first."""
    return str(at(index, nodes, ask or {}, how.pop("selector", {}), first=how.pop("first", 0), **how)["label_selector"][ID])


THREE = [node("c"), node("a"), node("b")]


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("first", [0, 1, 2, 77])
def test_actors_that_ask_for_nothing_are_one_more_on_some_nodes_at_most(count: int, first: int) -> None:
    there = Counter(chosen(index, THREE, first=first) for index in range(count))
    assert sum(there.values()) == count
    assert max(there.values()) - min(there[name] for name in "abc") <= 1


def test_optimizers_begin_on_different_nodes() -> None:
    assert {chosen(0, THREE, first=first) for first in range(3)} == {"a", "b", "c"}


def test_a_node_gets_no_more_than_it_has_room_for() -> None:
    nodes = [node("a", shard=1.0), node("b", shard=3.0), node("c")]
    assert Counter(chosen(index, nodes, {"shard": 1.0}) for index in range(4)) == {"a": 1, "b": 3}
    assert Counter(chosen(index, nodes, {"shard": 0.5}) for index in range(8)) == {"a": 2, "b": 6}


def test_a_node_is_filled_before_the_next_where_they_are_not_to_be_spread() -> None:
    nodes = [node("a", shard=2.0), node("b", shard=2.0)]
    assert [chosen(index, nodes, {"shard": 1.0}, spread=False) for index in range(4)] == ["a", "a", "b", "b"]
    assert [chosen(index, nodes, spread=False) for index in range(4)] == ["a"] * 4


@pytest.mark.parametrize("selector", [{"kind": "big"}, {"kind": "!small"}, {"kind": "in(big, huge)"}, {"kind": "!in(small)"}])
def test_only_living_nodes_with_the_labels_are_taken(selector: dict[str, str]) -> None:
    nodes = [node("a", label="small"), node("b", label="big"), node("c", label="big", alive=False), node("d", label="big")]
    assert {chosen(index, nodes, selector=selector) for index in range(6)} == {"b", "d"}


def test_standbys_of_a_node_s_shards_are_spread_over_the_others() -> None:
    for nodes in (THREE, [*THREE, node("d")], [*THREE, node("d"), node("e")]):
        first = [index for index in range(12) if chosen(index, nodes) == "a"]
        there = Counter(chosen(index, nodes, avoided={"a"}) for index in first)
        assert "a" not in there
        assert max(there.values()) - min(there[other["NodeID"]] for other in nodes if other["NodeID"] != "a") <= 1


def test_ray_chooses_where_the_node_is_gone_or_full_and_keeps_to_the_labels() -> None:
    asked = at(0, [node("a", label="big"), node("b", label="big")], {}, {"kind": "big"}, first=0, avoided={"a"})
    assert asked == {
        "label_selector": {"kind": "big", ID: "b"},
        "fallback_strategy": [{"label_selector": {"kind": "big", ID: "!in(a)"}}, {"label_selector": {"kind": "big"}}],
    }


def test_a_single_node_takes_the_standby_too_and_none_leaves_the_choice_to_ray() -> None:
    alone = at(0, [node("a")], {}, {}, first=0, avoided={"a"})
    assert alone == {"label_selector": {ID: "!in(a)"}, "fallback_strategy": [{"label_selector": {}}]}
    assert at(0, [], {}, {"kind": "big"}, first=5) == {"label_selector": {"kind": "big"}, "fallback_strategy": []}
