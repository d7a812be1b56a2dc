"""Rules on exposure: the token mode is set wherever Ray starts, and nothing is published."""

import re
from collections.abc import Iterator
from typing import Any

from tests.deploy import shell
from tests.deploy.tree import Tree

COMPOSE, DOCKERFILE = "deploy/docker/compose.yaml", "deploy/docker/Dockerfile"
POLICY, TRAIN_ENV = "deploy/kubernetes/shared/networkpolicy.yaml", "deploy/hosts/train.env"
PORTS = range(7000, 7064)
"""The TCP ports at which shards listen for other nodes."""
LISTENS = f"--port-range {PORTS[0]} {PORTS[-1]}"
RAY_PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-grpc-port": 6383,
    "min-worker-port": 10002,
    "max-worker-port": 19999,
}
AMONG_NODES = [(6379, 6383), (PORTS[0], PORTS[-1]), (8265, 8265), (10001, 19999), (52365, 52365)]
"""The TCP ports, first and last, at which nodes let each other in: Ray's and the shards'."""
OPENS_A_POD = (
    "/hostNetwork",
    "/hostPort",
    "/hostPID",
    "/hostIPC",
    "/ingressOptions",
    "/enableIngress",
)


def ours(tree: Tree) -> dict[str, dict[str, Any]]:
    """Return the compose services that run our image."""
    return {
        name: each
        for name, each in tree.compose["services"].items()
        if "distnadam" in each.get("image", "")
    }


def token_in_docker(tree: Tree) -> Iterator[str]:
    """The image and every service that runs it set RAY_AUTH_MODE=token."""
    if not re.search(r"^ENV .*\bRAY_AUTH_MODE=token\b", tree.texts[DOCKERFILE], re.M):
        yield f"{DOCKERFILE}: does not set RAY_AUTH_MODE=token"
    for name, service in ours(tree).items():
        if service.get("environment", {}).get("RAY_AUTH_MODE") != "token":
            yield f"{COMPOSE}: {name} has no RAY_AUTH_MODE: token"


def token_on_hosts(tree: Tree) -> Iterator[str]:
    """ray.env sets RAY_AUTH_MODE=token, and every unit reads it."""
    if "RAY_AUTH_MODE=token" not in tree.settings("deploy/hosts/ray.env"):
        yield "deploy/hosts/ray.env: does not set RAY_AUTH_MODE=token"
    for path in tree.under("deploy/hosts/", ".service"):
        if "EnvironmentFile=/etc/distnadam/ray.env" not in tree.texts[path].splitlines():
            yield f"{path}: does not read ray.env, which has the token's mode"


def token_in_launcher(tree: Tree) -> Iterator[str]:
    """Every `ray start` of the launcher is preceded by RAY_AUTH_MODE=token."""
    for path in tree.under("deploy/launcher/", ".yaml"):
        for line in shell.lines(tree, path):
            if "ray start" in line and "RAY_AUTH_MODE=token " not in line.partition("ray start")[0]:
                yield f"{path}: starts Ray without RAY_AUTH_MODE=token: {line[:60]}"


def token_in_pods(tree: Tree) -> Iterator[str]:
    """Every pod that Ray runs in sets RAY_AUTH_MODE=token; another rule checks the cluster."""
    for path, at, value in tree.values("deploy/kubernetes/"):
        if at.endswith("/template/spec/containers/0") and {
            "name": "RAY_AUTH_MODE",
            "value": "token",
        } not in value.get("env", ()):
            yield f"{path}: {at} has no RAY_AUTH_MODE: token"


def no_secret_inside(tree: Tree) -> Iterator[str]:
    """No file holds a secret, and none disables the token."""
    for path in tree.under("deploy/"):
        for line in tree.texts[path].splitlines():
            if re.search(
                r"(?:RAY_AUTH_TOKEN|SECRET_ACCESS_KEY|PASSWORD)\s*[=:]\s*[\"']?\w{8,}", line
            ):
                yield f"{path}: holds a secret: {line.strip()[:40]}"
            if re.search(r"RAY_AUTH_MODE\W+disabled", line):
                yield f"{path}: switches the token off"


def no_open_address(tree: Tree) -> Iterator[str]:
    """No file has the wildcard address, except in a policy's egress."""
    for path in tree.under("deploy/"):
        for line in tree.texts[path].splitlines():
            if re.search(r"0\.0\.0\.0|\[::\]|::/0", line) and not re.fullmatch(
                r"\s*cidr: 0\.0\.0\.0/0", line
            ):
                yield f"{path}: {line.strip()}"
    for path, _, value in tree.values("deploy/kubernetes/"):
        for rule in (
            value.get("ingress", ()) if isinstance(value, dict) and "podSelector" in value else ()
        ):
            if not rule.get("from") or "ipBlock" in str(rule["from"]):
                yield f"{path}: lets anybody in"


def dashboard_is_local(tree: Tree) -> Iterator[str]:
    """Every dashboard listens on its own host alone; in pods the network policy guards it."""
    for path in tree.under("deploy/"):
        for line in shell.lines(tree, path):
            hosts = set(re.findall(r"--dashboard-host[= ](\S+)", line))
            if hosts - {"127.0.0.1"} or ("ray start --head" in line and not hosts):
                yield f"{path}: the dashboard is not on 127.0.0.1: {line[:60]}"


def ports_are_local(tree: Tree) -> Iterator[str]:
    """Compose publishes on 127.0.0.1 alone, and Ray's services are on an internal network."""
    for name, service in tree.compose["services"].items():
        for port in service.get("ports", ()):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{COMPOSE}: {name} publishes {port}, which is not 127.0.0.1's alone"
        if service.get("network_mode") == "host" or service.get("privileged"):
            yield f"{COMPOSE}: {name} is not kept apart from the host"
    for name, service in ours(tree).items():
        if not all(
            (tree.compose["networks"][network] or {}).get("internal")
            for network in service["networks"]
        ):
            yield f"{COMPOSE}: {name} is in a network that is not internal"


def pods_are_closed(tree: Tree) -> Iterator[str]:
    """No pod uses its host's network, and no service or ingress publishes anything."""
    for path, at, value in tree.values("deploy/kubernetes/"):
        if (
            at.endswith(OPENS_A_POD)
            or value in ("LoadBalancer", "NodePort")
            or (at == "/kind" and value == "Ingress")
        ):
            yield f"{path}: {at} opens the pod to the host's network, or the world"


def clouds_are_closed(tree: Tree) -> Iterator[str]:
    """Cloud nodes have no public addresses; on AWS they have security groups of their own.

    Ray's default group opens port 22 to the world.
    """
    for path in tree.under("deploy/launcher/", ".yaml"):
        config = tree.documents(path)[0]
        if config["provider"]["type"] == "local":
            continue
        if config["provider"].get("use_internal_ips") is not True:
            yield f"{path}: its nodes get public addresses"
        for kind, node in config["available_node_types"].items():
            if config["provider"]["type"] == "aws" and not node["node_config"].get(
                "SecurityGroupIds"
            ):
                yield (
                    f"{path}: {kind} has no SecurityGroupIds, so Ray makes a group that "
                    "opens port 22 to the world"
                )


def shards_listen_at_known_ports(tree: Tree) -> Iterator[str]:
    """Every training says at which ports its shards listen."""
    for path in tree.under("deploy/"):
        for line in shell.lines(tree, path):
            if "distnadam train digits" in line and "--workers" in line and LISTENS not in line:
                yield f"{path}: shards listen at any port, not {LISTENS}: {line.strip()[:60]}"
    for path, at, value in tree.values("deploy/kubernetes/"):
        is_training = at.endswith(("/entrypoint", "/value")) and "distnadam train" in str(value)
        if is_training and LISTENS not in value:
            yield f"{path}: shards listen at any port, not {LISTENS}"
    if not any(LISTENS in line for line in tree.settings(TRAIN_ENV) if "TRAIN_ARGUMENTS" in line):
        yield f"{TRAIN_ENV}: shards listen at any port, not {LISTENS}"


def ray_takes_known_ports(tree: Tree) -> Iterator[str]:
    """Every node has Ray's processes at the ports that nodes let each other use."""
    for path in tree.under("deploy/"):
        if path.endswith(".md"):
            continue
        for line in shell.lines(tree, path):
            if "ray start" not in line:
                continue
            for name, port in RAY_PORTS.items():
                if f"--{name}={port}" not in line.split():
                    yield f"{path}: ray start does not say --{name}={port}: {line[:60]}"


def only_nodes_reach_shards(tree: Tree) -> Iterator[str]:
    """Nodes reach each other at the shards' ports; nobody else does, and none is published."""
    (policy,) = tree.documents(POLICY)
    among = {"podSelector": policy["spec"]["podSelector"]}
    for side, ends in (("ingress", "from"), ("egress", "to")):
        rules = policy["spec"][side]
        opened = [each for rule in rules if rule[ends] == [among] for each in _opened(rule)]
        if opened != AMONG_NODES:
            yield f"{POLICY}: {side} lets nodes reach each other at {opened}, not {AMONG_NODES}"
        for first, last in (
            each for rule in rules if among not in rule[ends] for each in _opened(rule)
        ):
            if first <= PORTS[-1] and last >= PORTS[0]:
                yield f"{POLICY}: {side} opens shards' ports beyond the nodes"
    for name, service in tree.compose["services"].items():
        for port in service.get("ports", ()):
            if int(str(port).rpartition(":")[2]) in PORTS:
                yield f"{COMPOSE}: {name} publishes a shard's port {port}"


def _opened(rule: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the TCP ports, first and last, that a policy's rule opens: all if it names none."""
    return [
        (port["port"], port.get("endPort", port["port"]))
        for port in rule.get("ports", [{"port": 1, "endPort": 65535, "protocol": "TCP"}])
        if port["protocol"] == "TCP"
    ]
