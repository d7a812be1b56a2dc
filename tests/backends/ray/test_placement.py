"""Which node each of several actors goes to: in turn, as room and labels allow, and away from
another where that can be.
"""

from collections import Counter
from typing import Any

import pytest

from distnadam.backends.ray.placement import (
    Avoid,
    Placement,
    RecentlyUnreachable,
    placement_options,
)

ID = "ray.io/node-id"
NOWHERE = Avoid()


def node(name: str, *, alive: bool = True, label: str = "", **resources: float) -> dict[str, Any]:
    return {
        "NodeID": name,
        "Alive": alive,
        "Resources": {"CPU": 8.0, **resources},
        "Labels": {"ray.io/node-id": name, "kind": label},
    }


def options(
    index: int,
    nodes: list[dict[str, Any]],
    ask: dict[str, float] | None = None,
    selector: dict[str, str] | None = None,
    avoid: Avoid = NOWHERE,
    **how: Any,
) -> dict[str, Any]:
    wanted = Placement(
        index=index,
        ask=ask or {},
        selector=selector or {},
        first=how.pop("first", 0),
        avoid=avoid,
        **how,
    )
    return placement_options(wanted, nodes)


def chosen(index: int, nodes: list[dict[str, Any]], **how: Any) -> str:
    """The node that is asked for first."""
    return str(options(index, nodes, **how)["label_selector"][ID])


THREE = [node("c"), node("a"), node("b")]


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("first", [0, 1, 2, 77])
def test_actors_that_ask_for_nothing_are_one_more_on_some_nodes_at_most(
    count: int, first: int
) -> None:
    there = Counter(chosen(index, THREE, first=first) for index in range(count))
    assert sum(there.values()) == count
    assert max(there.values()) - min(there[name] for name in "abc") <= 1


def test_optimizers_begin_on_different_nodes() -> None:
    assert {chosen(0, THREE, first=first) for first in range(3)} == {"a", "b", "c"}


def test_all_go_to_one_node_where_they_are_not_to_be_spread() -> None:
    assert len({chosen(index, THREE, spread=False) for index in range(5)}) == 1


def test_what_asks_for_something_is_left_to_ray_which_knows_what_is_free() -> None:
    plain = options(1, THREE, {"CPU": 1.0}, {"kind": "big"})
    assert plain == {
        "label_selector": {"kind": "big"},
        "fallback_strategy": [],
        "scheduling_strategy": "SPREAD",
    }
    apart = options(1, THREE, {"shard": 1.0}, avoid=Avoid(unreachable={"b"}, apart_from=["a"]))
    assert choices(apart) == [{ID: "!in(a,b)"}, {ID: "!in(a)"}, {}]


@pytest.mark.parametrize(
    "selector",
    [{"kind": "big"}, {"kind": "!small"}, {"kind": "in(big, huge)"}, {"kind": "!in(small)"}],
)
def test_only_living_nodes_with_the_labels_are_taken(selector: dict[str, str]) -> None:
    nodes = [
        node("a", label="small"),
        node("b", label="big"),
        node("c", label="big", alive=False),
        node("d", label="big"),
    ]
    assert {chosen(index, nodes, selector=selector) for index in range(6)} == {"b", "d"}


def test_standbys_of_a_node_s_shards_are_spread_over_the_others() -> None:
    for nodes in (THREE, [*THREE, node("d")], [*THREE, node("d"), node("e")]):
        first = [index for index in range(12) if chosen(index, nodes) == "a"]
        there = Counter(chosen(index, nodes, avoid=Avoid(apart_from=["a"])) for index in first)
        assert "a" not in there
        assert (
            max(there.values())
            - min(there[other["NodeID"]] for other in nodes if other["NodeID"] != "a")
            <= 1
        )


def choices(given: dict[str, Any]) -> list[dict[str, str]]:
    """The labels that are asked for, in order."""
    return [
        given["label_selector"],
        *(choice["label_selector"] for choice in given["fallback_strategy"]),
    ]


def test_ray_chooses_where_the_node_is_gone_and_keeps_to_the_labels_and_apart() -> None:
    nodes = [node(name, label="big") for name in "abc"]
    avoid = Avoid(unreachable=["b"], apart_from=["a"])
    asked = choices(options(0, nodes, selector={"kind": "big"}, avoid=avoid))
    assert asked == [
        {"kind": "big", ID: "c"},
        {"kind": "big", ID: "!in(a,b)"},
        {"kind": "big", ID: "!in(a)"},
        {"kind": "big"},
    ]


def test_a_single_node_takes_the_standby_too_and_none_leaves_the_choice_to_ray() -> None:
    assert choices(options(0, [node("a")], avoid=Avoid(apart_from=["a"]))) == [{ID: "!in(a)"}, {}]
    assert choices(options(0, [], selector={"kind": "big"}, first=5)) == [{"kind": "big"}]


def test_a_user_who_names_nodes_is_obeyed() -> None:
    avoid = Avoid(unreachable=["a"], apart_from=["b"])
    asked = choices(options(0, THREE, selector={ID: "in(a, b)"}, first=2, avoid=avoid))
    assert asked == [{ID: "in(a,b)"}]


def test_a_silent_node_is_forgotten() -> None:
    now = [100.0]
    silent = RecentlyUnreachable(lambda: now[0])
    silent.add("a", "")
    assert silent.now == {"a"}
    now[0] += 61.0
    assert silent.now == set()


def test_a_node_that_is_to_be_left_is_kept_off_though_the_selector_names_it() -> None:
    avoid = Avoid(unreachable=["a"], apart_from=["b"], cordoned=["c"])
    for selector in ("in(a, b, c)", "!in(d, e)"):
        asked = choices(options(0, THREE, selector={ID: selector}, avoid=avoid))
        assert asked == [{ID: "in(a,b)"}]
    assert choices(options(0, THREE, selector={ID: "c"}, avoid=avoid)) == [{ID: "c"}]
