"""Room for the shards on a cluster's nodes, and which node a shard, a standby or a worker goes to.

Ray's own SPREAD counts separately on every node that schedules, and a random node schedules an
actor that asks for no resource, so that such actors may all end on one node. For those the node is
named here, with Ray's choice as the fallback if that node is gone.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from distnadam.config import Options
from distnadam.errors import InsufficientResources
from distnadam.planning.requests import shard_ask, worker_ask

log = logging.getLogger("distnadam")

_NODE = "ray.io/node-id"
_REPORT_EVERY_S = 5.0
_UNREACHABLE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What several actors of one kind ask of the cluster.

    Args:
        who: what they are, "shards".
        number: how many there are to be.
        ask: what each asks for, by resource.
        selector: labels that its node must have.
        beside: what others of the same optimizer hold already, by resource.
    """

    who: str
    number: int
    ask: Mapping[str, float]
    selector: Mapping[str, str]
    beside: Mapping[str, float] = field(default_factory=dict)


def shards_demand(options: Options, number: int) -> Demand:
    """Return what so many shards need, standbys included."""
    return Demand(
        who="shards", number=number, ask=shard_ask(options), selector=options.label_selector
    )


def workers_demand(options: Options, number: int, shards: int) -> Demand:
    """Return what workers need beside so many shards, standbys included: those of them, of so many,
    that the run cannot go on without.
    """
    least = min(number, options.min_workers or number)
    return Demand(
        who="workers",
        number=least,
        ask=worker_ask(options),
        selector=options.worker_label_selector,
        beside={name: amount * shards for name, amount in shard_ask(options).items()},
    )


def await_room(
    demand: Demand, start_timeout_s: float | None, cordoned: Callable[[], Collection[str]] = tuple
) -> None:
    """Wait up to `start_timeout_s` for nodes that could hold actors if they were empty.

    Args:
        demand: what they ask.
        start_timeout_s: seconds; None waits for none.
        cordoned: returns the nodes that nothing may go to.

    Raises:
        InsufficientResources: there are none.
    """
    deadline = time.monotonic() + (start_timeout_s or 0.0)
    while (lacking := _lacking(demand, ray.nodes(), cordoned())) is not None:
        if time.monotonic() >= deadline:
            remedy = (
                "ask for less in Options, or add nodes (Options(start_timeout_s=...) "
                "waits for them)"
            )
            raise InsufficientResources(f"{lacking}; {remedy}")
        log.warning("waiting for nodes: %s", lacking)
        time.sleep(min(_REPORT_EVERY_S, max(0.1, deadline - time.monotonic())))


def _lacking(
    demand: Demand, nodes: Sequence[Mapping[str, Any]], closed: Collection[str]
) -> str | None:
    """Return what empty nodes lack, in words; None if there is room."""
    found = _suitable(nodes, demand.selector)
    open_ones = [node for node in found if node["NodeID"] not in closed]
    fit = sum(room(node["Resources"], demand.ask, demand.number) for node in open_ones)
    anywhere = [node for node in nodes if node["Alive"] and node["NodeID"] not in closed]
    asks = _positive(demand.ask)
    short = [
        name
        for name, amount in asks.items()
        if demand.number * amount + demand.beside.get(name, 0.0) > _total(anywhere, name) + 1e-9
    ]
    if fit >= demand.number and not short:
        return None
    held = _positive(demand.beside)
    wanted = [
        f"{name} {amount:g} each, the nodes have {_total(open_ones, name):g} in all"
        + (f" and the shards take {held[name]:g}" if name in held else "")
        for name, amount in asks.items()
    ]
    lacking = (
        f"{demand.number} {demand.who} ask {', '.join(wanted) or 'no resource'}: "
        f"{len(open_ones)} suitable node(s)"
    )
    lacking += f" have room for {fit}" if fit < demand.number else " have no room for both"
    if left := len(found) - len(open_ones):
        lacking += f", {left} more to be left (`distnadam uncordon` takes a host back)"
    return lacking


def _total(nodes: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(node["Resources"].get(name, 0.0) for node in nodes))


class RecentlyUnreachable:
    """The nodes that did not answer lately; Ray takes up to a minute to notice that one is gone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}

    def add(self, *nodes: str) -> None:
        """Remember nodes that do not answer now."""
        self._since |= {node: self._clock() for node in nodes if node}

    @property
    def now(self) -> set[str]:
        """The nodes that did not answer within the last minute."""
        return {
            node
            for node, since in list(self._since.items())  # another thread may add to it
            if self._clock() - since < _UNREACHABLE_S
        }


@dataclass(frozen=True, kw_only=True)
class Avoid:
    """Nodes that an actor is not to go to.

    Args:
        unreachable: nodes to avoid whenever another node qualifies.
        apart_from: nodes to avoid whenever any other node, even an unreachable one, qualifies.
        cordoned: nodes to avoid in any case.
    """

    unreachable: Collection[str] = ()
    apart_from: Collection[str] = ()
    cordoned: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one of several actors that ask for the same shall go.

    Args:
        index: which of them it is.
        ask: what it asks for, by resource.
        selector: labels that its node must have.
        first: the position, among the nodes in the order of their names, of the first actor's node;
            any number.
        spread: one on each node in turn; otherwise all on one.
        avoid: nodes that it is not to go to.
        on: the node to prefer to all others, if it is none of those.
    """

    index: int
    ask: Mapping[str, float]
    selector: Mapping[str, str]
    first: int
    spread: bool = True
    avoid: Avoid = field(default_factory=Avoid)
    on: str | None = None


def placement_options(wanted: Placement, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options by which Ray places an actor, given the nodes as `ray.nodes` returns them.

    What asks for a resource is left to Ray, which knows what is free and lets an autoscaler know
    what is not.
    """
    # Ray takes a space in a list for part of a value
    selector = {key: value.replace(" ", "") for key, value in wanted.selector.items()}
    avoid = wanted.avoid
    apart_from = sorted({*avoid.apart_from, *avoid.cordoned})
    avoided = sorted({*avoid.unreachable, *apart_from})
    suit = sorted(str(node["NodeID"]) for node in _suitable(nodes, selector))
    choices = [dict(selector)]
    if _NODE in selector:  # whoever names nodes is obeyed, but for those that are to be left
        stays = [node for node in suit if node not in avoid.cordoned]
        if stays and avoid.cordoned:
            choices = [{**selector, _NODE: f"in({','.join(stays)})"}]
    else:
        # the last choice of all is the least that an actor must have
        kept_off = (avoided, apart_from, sorted(avoid.cordoned))
        unlike = dict.fromkeys(f"!in({','.join(some)})" for some in kept_off if some)
        choices = [{**selector, _NODE: each} for each in unlike]
        choices += [] if avoid.cordoned else [dict(selector)]
        free = [node for node in suit if node not in avoided]
        if free and not _positive(wanted.ask):
            position = (wanted.first + wanted.index * wanted.spread) % len(free)
            choices.insert(0, {**selector, _NODE: free[position]})
        if wanted.on in free:
            choices.insert(0, {**selector, _NODE: wanted.on})
    options = {
        "label_selector": choices[0],
        "fallback_strategy": [{"label_selector": choice} for choice in choices[1:]],
    }
    return options | ({"scheduling_strategy": "SPREAD"} if wanted.spread else {})


def suitable(
    nodes: Sequence[Mapping[str, Any]],
    selector: Mapping[str, str],
    ask: Mapping[str, float],
    avoid: Avoid,
) -> list[Mapping[str, Any]]:
    """Return the living nodes that have the labels, and the resources if they were empty, without
    those that are cordoned.
    """
    return [
        node
        for node in _suitable(nodes, selector)
        if node["NodeID"] not in avoid.cordoned and room(node["Resources"], ask, 1)
    ]


def nodes_beside(
    facts: Sequence[Mapping[str, str]], options: Options
) -> tuple[list[str], list[str]]:
    """Return the ids of the living nodes that processes with these facts are not on, and of those
    of them that suit shards.
    """
    words = [each["node"] for each in facts]
    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and not any(f"(id {node['NodeID'][:12]})" in where for where in words)
    ]
    suit = suitable(others, options.label_selector, shard_ask(options), Avoid())
    return [node["NodeID"] for node in others], [node["NodeID"] for node in suit]


def _positive(ask: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in ask.items() if amount > 0}


def _suitable(
    nodes: Sequence[Mapping[str, Any]], selector: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    """Return the living nodes that have the labels."""
    return [node for node in nodes if node["Alive"] and _labelled(node, selector)]


def _labelled(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    return all(_meets(node.get("Labels", {}).get(key), wanted) for key, wanted in selector.items())


def _meets(label: str | None, wanted: str) -> bool:
    """Whether a label meets one of Ray's selectors: value, !value, in(a,b) or !in(a,b)."""
    plain = wanted.removeprefix("!")
    among = plain[3:-1].split(",") if plain.startswith("in(") else [plain]
    return (label in [value.strip() for value in among]) == (plain == wanted)


def room(resources: Mapping[str, float], ask: Mapping[str, float], most: int) -> int:
    """Return how many processes that ask for this fit into the resources, at most `most`."""
    wanted = _positive(ask).items()
    return min(
        [most, *(int((resources.get(name, 0.0) + 1e-9) // amount) for name, amount in wanted)]
    )
