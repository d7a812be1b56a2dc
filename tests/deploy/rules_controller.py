"""The rules of KubeRay 1.7's controller that its schema lacks; breaking them fails in a cluster."""

import re
from collections.abc import Iterator

from tests.deploy.clusters import Cluster, clusters, rendered
from tests.deploy.tree import Tree

LONGEST = {"RayCluster": 53, "RayJob": 47}
LABEL_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
SIZES = ("num-cpus", "num-gpus", "memory", "resources")
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions", "gcsFaultToleranceOptions")
OLDEST = (2, 54)


def names(tree: Tree) -> Iterator[str]:
    """Names are DNS labels, and short enough for the names that KubeRay derives from them."""
    for cluster in clusters(tree):
        name = cluster.holder["metadata"]["name"]
        if len(name) > LONGEST[cluster.holder["kind"]] or not LABEL_NAME.fullmatch(name):
            yield (
                f"{cluster.name}: not a DNS label of at most "
                f"{LONGEST[cluster.holder['kind']]} characters"
            )


def authentication(tree: Tree) -> Iterator[str]:
    """Token authentication is requested explicitly, of a version that has it."""
    for cluster in clusters(tree):
        version = cluster.spec.get("rayVersion")
        if cluster.spec.get("authOptions") != {"mode": "token"}:
            yield (
                f"{cluster.name}: authOptions is not {{mode: token}}, so there is no authentication"
            )
        if not isinstance(version, str):
            yield f"{cluster.name}: rayVersion must be given, as text, where there is a token"
        elif tuple(map(int, version.split(".")[:2])) < OLDEST:
            yield f"{cluster.name}: rayVersion {version} is older than {OLDEST}"


def restart_policy(tree: Tree) -> Iterator[str]:
    """With autoscaler v2, which we request, pods are not restarted in place."""
    for cluster in clusters(tree):
        options = cluster.spec.get("autoscalerOptions", {})
        if (
            cluster.spec.get("enableInTreeAutoscaling") is not True
            or options.get("version") != "v2"
        ):
            yield f"{cluster.name}: does not ask for autoscaler v2"
        for group in cluster.groups:
            if group.pod["spec"].get("restartPolicy", "Never") != "Never":
                yield (
                    f"{cluster.name}, {group.name}: restartPolicy must be Never or unset "
                    "with autoscaler v2"
                )
            if any(
                one["name"] == "RAY_enable_autoscaler_v2" for one in group.container.get("env", ())
            ):
                yield f"{cluster.name}, {group.name}: the autoscaler's version is said twice"


def resources_once(tree: Tree) -> Iterator[str]:
    """A group's node resources are given in `resources` or in rayStartParams, not in both."""
    for cluster in clusters(tree):
        for group in cluster.groups:
            if group.spec.get("resources") and any(key in group.params for key in SIZES):
                yield (
                    f"{cluster.name}, {group.name}: resources both in `resources` and in "
                    "rayStartParams"
                )


def labels(tree: Tree) -> Iterator[str]:
    """Labels are in the group's `labels`, not in rayStartParams, and legal in Kubernetes."""
    for cluster in clusters(tree):
        for group in cluster.groups:
            if "labels" in group.params:
                yield (
                    f"{cluster.name}, {group.name}: rayStartParams.labels is refused; use "
                    "the group's labels"
                )
            for key, value in group.spec.get("labels", {}).items():
                if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                    yield f"{cluster.name}, {group.name}: {key}={value} is no label"


def replicas(tree: Tree) -> Iterator[str]:
    """Each group has a minimum and a maximum, in that order, and a container."""
    for cluster in clusters(tree):
        for group in cluster.workers:
            least, most = group.spec.get("minReplicas", 0), group.spec.get("maxReplicas", 0)
            if not 0 <= least <= group.spec.get("replicas", least) <= most:
                yield (
                    f"{cluster.name}, {group.name}: {least}, {group.spec.get('replicas')}, "
                    f"{most} replicas are not in order"
                )
            if group.spec.get("suspend"):
                yield f"{cluster.name}, {group.name}: cannot be suspended with the autoscaler"


def finishing(tree: Tree) -> Iterator[str]:
    """A job that is kept shuts its cluster down, and one that is retried makes a new one."""
    for job in _jobs(tree):
        spec = job.holder["spec"]
        if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
            yield f"{job.name}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
        if spec.get("clusterSelector") or "rayClusterSpec" not in spec:
            yield f"{job.name}: has no cluster of its own, so it cannot be retried"
        if spec.get("submissionMode", "K8sJobMode") not in (
            "K8sJobMode",
            "HTTPMode",
            "SidecarMode",
        ):
            yield f"{job.name}: backoffLimit is refused with {spec['submissionMode']}"
        if spec.get("backoffLimit", 0) < 1:
            yield f"{job.name}: backoffLimit is 0, so it is not retried"
        if "deletionStrategy" in spec or spec.get("suspend"):
            yield (
                f"{job.name}: deletionStrategy needs a feature gate, and a suspended job "
                "does not run"
            )


def no_gates(tree: Tree) -> Iterator[str]:
    """Nothing needs a feature that the operator disables by default, and nothing is served."""
    for cluster in clusters(tree):
        if gated := set(GATED) & cluster.spec.keys():
            yield f"{cluster.name}: {sorted(gated)} need a feature gate, or storage of their own"
    for folder, found in rendered(tree):
        if found["kind"] == "RayService":
            yield f"{folder}: a RayService, but nothing is served"


def _jobs(tree: Tree) -> list[Cluster]:
    return [cluster for cluster in clusters(tree) if cluster.holder["kind"] == "RayJob"]
