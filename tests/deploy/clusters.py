"""The Ray clusters of the rendered manifests: holders, groups, and Kubernetes quantities."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.deploy.kustomize import render
from tests.deploy.tree import Tree

FOLDERS = (
    "deploy/kubernetes/base",
    "deploy/kubernetes/cluster",
    "deploy/kubernetes/overlays/large",
)
SUFFIXES = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Group:
    """One group of pods: its name in the manifest, its spec, and its pod template."""

    name: str
    spec: dict[str, Any]

    @property
    def pod(self) -> dict[str, Any]:
        """The pod's spec."""
        found: dict[str, Any] = self.spec["template"]
        return found

    @property
    def container(self) -> dict[str, Any]:
        """The container that Ray runs in."""
        found: dict[str, Any] = self.pod["spec"]["containers"][0]
        return found

    @property
    def params(self) -> dict[str, str]:
        """The arguments of `ray start`, by name."""
        return dict(self.spec.get("rayStartParams", {}))

    @property
    def shm(self) -> float:
        """The size of /dev/shm in bytes; 0 if nothing is mounted there."""
        mounts = {
            mount["mountPath"]: mount["name"] for mount in self.container.get("volumeMounts", ())
        }
        volumes = {volume["name"]: volume for volume in self.pod["spec"].get("volumes", ())}
        where = volumes.get(mounts.get("/dev/shm"), {}).get("emptyDir", {})
        return quantity(where.get("sizeLimit", "0")) if where.get("medium") == "Memory" else 0.0


@dataclass(frozen=True)
class Cluster:
    """One cluster, and the RayCluster or RayJob that holds it."""

    folder: str
    holder: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in a complaint."""
        return f"{self.folder}: {self.holder['kind']} {self.holder['metadata']['name']}"

    @property
    def spec(self) -> dict[str, Any]:
        """The cluster's spec."""
        found: dict[str, Any] = self.holder["spec"]
        return found["rayClusterSpec"] if self.holder["kind"] == "RayJob" else found

    @cached_property
    def head(self) -> Group:
        """The head's group."""
        return Group("head", self.spec["headGroupSpec"])

    @cached_property
    def workers(self) -> list[Group]:
        """The groups of nodes."""
        return [Group(spec["groupName"], spec) for spec in self.spec.get("workerGroupSpecs", ())]

    @property
    def groups(self) -> list[Group]:
        """All groups, the head's first."""
        return [self.head, *self.workers]


def rendered(tree: Tree) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return every object that would be applied, by the directory of its kustomization."""
    for folder in FOLDERS:
        with suppress(ValueError):
            yield from ((folder, found) for found in render(tree, folder))


def clusters(tree: Tree) -> list[Cluster]:
    """Yield every cluster that would be applied."""
    return [
        Cluster(folder, found)
        for folder, found in rendered(tree)
        if found["kind"] in ("RayCluster", "RayJob")
    ]


def pods(tree: Tree) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template, submitters' too, with its name in a complaint."""
    for cluster in clusters(tree):
        yield from ((f"{cluster.name}, {group.name}", group.pod) for group in cluster.groups)
        if submitter := cluster.holder["spec"].get("submitterPodTemplate"):
            yield f"{cluster.name}, submitter", submitter


def quantity(text: str | int) -> float:
    """Return a Kubernetes quantity as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(\w*)", str(text))
    assert match is not None and match[2] in SUFFIXES, f"{text!r} is no quantity"
    return float(match[1]) * SUFFIXES[match[2]]
