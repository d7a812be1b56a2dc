"""Room for the shards on a cluster's nodes, and which node a shard, a standby or a worker goes to.

Ray's own SPREAD counts separately on every node that decides, and an actor that asks for no CPU is decided on by a random one, so that such
actors may all end on one node. So we name a node, and Ray chooses where that one is gone or full.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray

from distnadam.config import Options
from distnadam.errors import InsufficientResources

log = logging.getLogger("distnadam")

_NODE = "ray.io/node-id"
_REPORT_EVERY_S = 5.0


def check_fits(options: Options, num_shards: int) -> None:
    """Raise InsufficientResources where the nodes, even empty, cannot hold the shards; wait first as long as `start_timeout_s` says."""
    ask = _positive(shard_ask(options))
    deadline = time.monotonic() + (options.start_timeout_s or 0.0)
    while True:
        nodes = _suitable(ray.nodes(), options.label_selector)
        room = sum(_room(node["Resources"], ask, num_shards) for node in nodes)
        if room >= num_shards:
            return
        has = {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ask}
        wanted = ", ".join(f"{name} {amount:g} each, the nodes have {has[name]:g} in all" for name, amount in ask.items()) or "no resource"
        told = f"{num_shards} shards ask {wanted}: {len(nodes)} suitable node(s) have room for {room}"
        if time.monotonic() >= deadline:
            remedy = "ask for less in Options, or add nodes (Options(start_timeout_s=...) waits for them)"
            raise InsufficientResources(f"{told}; {remedy}")
        log.warning("waiting for nodes: %s", told)
        time.sleep(min(_REPORT_EVERY_S, max(0.1, deadline - time.monotonic())))


def shard_ask(options: Options) -> dict[str, float]:
    """Return what each shard asks of Ray, by resource."""
    return {"CPU": options.shard_cpus, "memory": float(options.shard_memory_bytes), **options.shard_resources}


def at(
    index: int,
    nodes: Sequence[Mapping[str, Any]],
    ask: Mapping[str, float],
    selector: Mapping[str, str],
    *,
    first: int,
    spread: bool = True,
    avoided: Collection[str] = (),
) -> dict[str, Any]:
    """Return the options by which Ray places one of several actors that ask the same.

    Args:
        index: which of them it is.
        nodes: the cluster's, as `ray.nodes` tells of them.
        ask: what it asks, by resource.
        selector: labels that its node must have.
        first: with which of the nodes, in the order of their names, to begin; any number.
        spread: one on each node in turn; otherwise a node is filled before the next one gets any.
        avoided: nodes that get none, where there are others.
    """
    others = sorted((node for node in _suitable(nodes, selector) if node["NodeID"] not in avoided), key=lambda node: str(node["NodeID"]))
    seats = _seats(_rotated(others, first), _positive(ask), index + 1, spread=spread)
    choices = [dict(selector)]
    if avoided:
        choices.insert(0, {**selector, _NODE: f"!in({', '.join(sorted(avoided))})"})
    if seats:
        choices.insert(0, {**selector, _NODE: seats[index % len(seats)]})
    return {"label_selector": choices[0], "fallback_strategy": [{"label_selector": choice} for choice in choices[1:]]}


def _seats(nodes: Sequence[Mapping[str, Any]], ask: Mapping[str, float], most: int, *, spread: bool) -> list[str]:
    """Return the nodes' names in the order in which they are filled, each as often as it has room, but no more than so often."""
    seats = [(turn, str(node["NodeID"])) for node in nodes for turn in range(_room(node["Resources"], ask, most))]
    return [node for _, node in (sorted(seats, key=lambda seat: seat[0]) if spread else seats)]


def _rotated(nodes: Sequence[Any], first: int) -> list[Any]:
    start = first % max(1, len(nodes))
    return [*nodes[start:], *nodes[:start]]


def _positive(ask: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in ask.items() if amount > 0}


def _suitable(nodes: Sequence[Mapping[str, Any]], selector: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Return the living nodes that have the labels."""
    return [node for node in nodes if node["Alive"] and _labelled(node, selector)]


def _labelled(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    return all(_meets(node.get("Labels", {}).get(key), wanted) for key, wanted in selector.items())


def _meets(label: str | None, wanted: str) -> bool:
    """Whether a label is as Ray's selectors say it: value, !value, in(a,b) or !in(a,b)."""
    plain = wanted.removeprefix("!")
    among = plain[3:-1].split(",") if plain.startswith("in(") else [plain]
    return (label in [value.strip() for value in among]) == (plain == wanted)


def _room(resources: Mapping[str, float], ask: Mapping[str, float], most: int) -> int:
    return min([most, *(int((resources.get(name, 0.0) + 1e-9) // amount) for name, amount in ask.items())])
