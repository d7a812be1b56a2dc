"""Rules on machines without Kubernetes: image, compose file, systemd hosts, cluster launcher."""

import copy
import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from distnadam.planning import memory
from distnadam.planning.planned_run import PlannedRun
from tests.deploy import shell
from tests.deploy.clusters import quantity
from tests.deploy.rules_exposure import COMPOSE, DOCKERFILE, ours
from tests.deploy.tree import Tree
from tests.deploy.units import PROGRAMS, Unit

SERVICE = {
    "image",
    "build",
    "command",
    "environment",
    "networks",
    "restart",
    "init",
    "cap_drop",
    "security_opt",
    "shm_size",
    "mem_limit",
}
SERVICE |= {"healthcheck", "depends_on", "configs", "volumes", "ports"}
TOP = {"name", "services", "networks", "configs", "volumes", "x-ray"}
EXTRAS = {"digits", "metrics", "s3"}


def image_is_pinned_and_unprivileged(tree: Tree) -> Iterator[str]:
    """The image installs our wheel with the pins of constraints.txt, and does not run as root."""
    text = shell.whole(tree.texts[DOCKERFILE])
    users = re.findall(r"^USER (\S+)", text, re.M)
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield (
            f"{DOCKERFILE}: ends as user {users[-1] if users else 'root'}: give a number "
            "that is not 0, so that Kubernetes can tell"
        )
    for line in shell.lines(tree, DOCKERFILE):
        for command in line.split("&&"):
            if "pip install" in command and (
                "--constraint" not in command or ".whl" not in command
            ):
                yield (
                    f"{DOCKERFILE}: installs without constraints.txt, or something else than "
                    f"the wheel: {command.strip()[:60]}"
                )
    if "pip wheel" not in text or not re.search(r"^COPY --from=build .*/wheel", text, re.M):
        yield f"{DOCKERFILE}: does not build the wheel, or does not take the one that it built"
    extras = {
        extra
        for found in re.findall(r"\.whl[^\])]*\)\[([\w,]+)\]", text)
        for extra in found.split(",")
    }
    if missing := EXTRAS - extras:
        yield f"{DOCKERFILE}: lacks the extras {sorted(missing)}"


def compose_is_known(tree: Tree) -> Iterator[str]:
    """The compose file has only known fields, and mounts files that exist."""
    if unknown := tree.compose.keys() - TOP:
        yield f"{COMPOSE}: unknown {sorted(unknown)}"
    for name, service in tree.compose["services"].items():
        if unknown := service.keys() - SERVICE:
            yield f"{COMPOSE}: {name} has unknown {sorted(unknown)}"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            at = posixpath.normpath(posixpath.join("deploy/docker", source))
            known = (
                source in tree.compose["volumes"]
                if "/" not in source
                else any(path.startswith(at) for path in tree.texts)
            )
            if not known:
                yield f"{COMPOSE}: {name} mounts {source}, which is not there"
        for kind in ("networks", "configs"):
            for used in service.get(kind, ()):
                if (used["source"] if isinstance(used, dict) else used) not in tree.compose[kind]:
                    yield f"{COMPOSE}: {name} has {kind} that are not described: {used}"
    if (
        absent := {"head", "node-1", "node-2", "storage", "prometheus", "grafana"}
        - tree.compose["services"].keys()
    ):
        yield f"{COMPOSE}: has no {sorted(absent)}"


def prometheus_finds_the_nodes(tree: Tree) -> Iterator[str]:
    """Prometheus scrapes every service that Ray runs in, at the port of its metrics."""
    targets = {
        target
        for path in tree.under("deploy/monitoring/targets/")
        for group in tree.documents(path)[0]
        for target in group["targets"]
    }
    exporting = set()
    for name, service in ours(tree).items():
        port = re.search(r"--metrics-export-port=(\d+)", service["command"])
        exporting.add(f"{name}:{port[1] if port else 'none'}")
    if targets != exporting:
        yield (
            f"deploy/monitoring/targets: Prometheus asks {sorted(targets)}, but nodes export "
            f"at {sorted(exporting)}"
        )


def compose_sizes_follow(tree: Tree) -> Iterator[str]:
    """The services' /dev/shm, store and memory follow from the plan and their comment."""
    said = re.search(r"# distnadam plan (--parameters .*)", tree.texts[COMPOSE])
    values = dict(re.findall(r"--([\w-]+) (\S+)", said[1])) if said else {}
    run = PlannedRun(**{key.replace("-", "_"): int(float(value)) for key, value in values.items()})
    node = memory.shared_node(run)
    for name, service in ours(tree).items():
        store = re.search(r"--object-store-memory=(\d+)", service["command"])
        has = (
            int(store[1]) if store else 0,
            *(_bytes(service[key]) for key in ("shm_size", "mem_limit")),
        )
        if has != (node.store, node.shm, node.memory):
            yield (
                f"{COMPOSE}: {name} has store, /dev/shm and memory {has}, {node} is what "
                "the plan says"
            )


def units_are_complete(tree: Tree) -> Iterator[str]:
    """Units take variables from files, name programs by path, and keep Ray in the foreground."""
    known = {
        line.partition("=")[0]
        for env in ("ray", "train")
        for line in tree.settings(f"deploy/hosts/{env}.env")
    }
    for path in tree.under("deploy/hosts/", ".service"):
        unit = Unit.parse(tree.texts[path])
        if (
            unknown := set(re.findall(r"\$\{?(\w+)", " ".join(unit.values("Service", "ExecStart"))))
            - known
        ):
            yield f"{path}: nobody sets {sorted(unknown)}"
        for line in shell.lines(tree, path):
            if not line.startswith("/"):
                yield f"{path}: systemd wants a path: {line[:40]}"
            if " start " in line and "--block" not in line:
                yield f"{path}: ray start ends at once without --block, and its node with it"
        if unit.values("Service", "User") != ["distnadam"]:
            yield f"{path}: runs as root"


def units_survive_a_reboot(tree: Tree) -> Iterator[str]:
    """Every unit can be enabled, so that it also starts after a reboot."""
    for path in tree.under("deploy/hosts/", ".service"):
        if Unit.parse(tree.texts[path]).values("Install", "WantedBy") != ["multi-user.target"]:
            yield f"{path}: is not started after a reboot, since nothing wants it"


def units_find_our_commands(tree: Tree) -> Iterator[str]:
    """A unit's program finds commands such as `distnadam` in the cluster's environment first."""
    for path in tree.under("deploy/hosts/", ".service"):
        values = Unit.parse(tree.texts[path]).values("Service", "Environment")
        if not any(value.startswith(f"PATH={PROGRAMS}:") for value in values):
            yield f"{path}: does not find our commands: no Environment=PATH={PROGRAMS}:..."


def the_run_ends_before_the_head(tree: Tree) -> Iterator[str]:
    """The run's unit starts the head and stops before it; `cluster.sh stop` ends it first."""
    path, script = "deploy/hosts/distnadam-train.service", tree.texts["deploy/hosts/cluster.sh"]
    unit = Unit.parse(tree.texts[path])
    for key in ("Wants", "PartOf", "After"):
        if "distnadam-head.service" not in " ".join(unit.values("Unit", key)).split():
            yield f"{path}: has no {key}=distnadam-head.service"
    for key in ("Requires", "BindsTo"):
        if unit.values("Unit", key):
            yield f"{path}: {key}= would keep the run from going on after its head has died"
    stops = re.findall(r"disable --now distnadam-(\w+)", script)
    if stops != ["train", "node", "head"]:
        yield (
            f"deploy/hosts/cluster.sh: stops {stops}: first the run, which would start the "
            "head again, and last the head"
        )


@cache
def launcher_schema() -> dict[str, Any]:
    """Return the launcher's schema from the installed Ray, with unknown fields refused."""
    import ray.autoscaler

    schema: dict[str, Any] = json.loads(
        (Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()
    )
    closed(schema["properties"]["provider"])
    closed(schema["properties"]["available_node_types"]["patternProperties"][".*"])
    return schema


def closed(schema: Any) -> None:
    """Refuse unknown fields in every object whose schema lists its fields."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and not schema.get(
            "x-kubernetes-preserve-unknown-fields"
        ):
            schema["additionalProperties"] = False
        for child in schema.values():
            closed(child)
    elif isinstance(schema, list):
        for child in schema:
            closed(child)


def launcher_fits_its_schema(tree: Tree) -> Iterator[str]:
    """Every launcher cluster satisfies Ray's own schema."""
    validator = jsonschema.Draft7Validator(launcher_schema())
    for path in tree.under("deploy/launcher/", ".yaml"):
        yield from (
            f"{path}: {error.json_path}: {error.message[:160]}"
            for error in validator.iter_errors(tree.documents(path)[0])
        )


def launcher_takes_it(tree: Tree) -> Iterator[str]:
    """Every launcher cluster passes Ray's own checks, after Ray has filled in its defaults."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    for path in tree.under("deploy/launcher/", ".yaml"):
        try:
            validate_config(prepare_config(copy.deepcopy(tree.documents(path)[0])))
        except Exception as error:
            yield f"{path}: {str(error).splitlines()[0]}"


def launcher_installs_nothing_else(tree: Tree) -> Iterator[str]:
    """Where Ray's defaults would install a nightly wheel, the file names its own commands."""
    for path in tree.under("deploy/launcher/", ".yaml"):
        config = tree.documents(path)[0]
        if any(
            key not in config
            for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")
        ):
            yield f"{path}: leaves what is installed to Ray's defaults"
        installs = [line for line in config.get("setup_commands", ()) if "pip install" in line]
        if not config.get("docker", {}).get("image") and not installs:
            yield f"{path}: has neither an image nor a command that installs"
        if any("--constraint" not in line for line in installs):
            yield f"{path}: installs without constraints.txt"


def launcher_groups_are_labelled(tree: Tree) -> Iterator[str]:
    """In the clouds, shards and workers have node types of their own, with the job's labels."""
    for path in tree.under("deploy/launcher/", ".yaml"):
        for kind, node in tree.documents(path)[0].get("available_node_types", {}).items():
            wanted = {} if kind == "head" else {"distnadam/role": kind}
            if node.get("labels", {}) != wanted:
                yield f"{path}: {kind} has the labels {node.get('labels')}, not {wanted}"


def _bytes(text: str) -> int:
    """Return a Docker size in bytes; its units are powers of two."""
    return int(quantity(text.lower().replace("mb", "Mi").replace("gb", "Gi")))
