"""Our own rules on pods: user, resources, groups, and network."""

import shlex
from collections.abc import Iterator

import click

from distnadam.planning import memory
from distnadam.planning.planned_run import PlannedRun
from tests.deploy import shell
from tests.deploy.clusters import FOLDERS, Cluster, clusters, pods, quantity, rendered
from tests.deploy.commands import entry_point
from tests.deploy.kustomize import render
from tests.deploy.tree import Tree

PART = {"app.kubernetes.io/part-of": "distnadam"}
SECRET, README = "deploy/kubernetes/secret.example.yaml", "deploy/README.md"
OF_A_RUN = {"steps", "quiet"}
"""Options of a job that its cluster does not depend on."""


def overlays_apply(tree: Tree) -> Iterator[str]:
    """Each kustomization finds its files, and each patch its resource and field."""
    for folder in FOLDERS:
        try:
            render(tree, folder)
        except ValueError as error:
            yield str(error)


def requests_are_limits(tree: Tree) -> Iterator[str]:
    """Every container's limits equal its requests, of memory and CPUs."""
    for cluster in clusters(tree):
        asked = cluster.spec.get("autoscalerOptions", {}).get("resources", {})
        if not asked.get("limits") or asked.get("requests") != asked["limits"]:
            yield f"{cluster.name}, autoscaler: requests are not limits"
    for name, pod in pods(tree):
        for container in pod["spec"]["containers"]:
            asked = container.get("resources", {})
            if (
                asked.get("requests") != asked.get("limits")
                or {"cpu", "memory"} - asked.get("limits", {}).keys()
            ):
                yield (
                    f"{name}: {container['name']} has requests {asked.get('requests')} and "
                    f"limits {asked.get('limits')}"
                )


def nobody_is_root(tree: Tree) -> Iterator[str]:
    """Every container runs as a user other than root, without capabilities."""
    for name, pod in pods(tree):
        context = pod["spec"].get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{name}: may run as root"
        for container in pod["spec"]["containers"]:
            kept = container.get("securityContext", {})
            if kept.get("allowPrivilegeEscalation") is not False or kept.get(
                "capabilities", {}
            ).get("drop") != ["ALL"]:
                yield f"{name}: {container['name']} keeps privileges"


def nothing_on_the_head(tree: Tree) -> Iterator[str]:
    """The head has no CPUs, so that shards and workers, which request some, go elsewhere."""
    for cluster in clusters(tree):
        if cluster.head.params.get("num-cpus") != "0":
            yield f'{cluster.name}: the head has no num-cpus: "0"'


def asked(cluster: Cluster) -> dict[str, object]:
    """Return the arguments of a job's entrypoint."""
    return trained(cluster.holder["spec"]["entrypoint"])


def trained(command: str) -> dict[str, object]:
    """Return the options of a `distnadam train`, as the command line parses them."""
    words = shlex.split(command)
    train = entry_point("distnadam")
    assert isinstance(train, click.Group) and words[:2] == ["distnadam", "train"]
    return train.commands["train"].make_context("train", words[2:]).params


def groups_are_selected(tree: Tree) -> Iterator[str]:
    """The job sends shards and workers to groups of their own by label, with CPUs and a timeout."""
    for cluster in clusters(tree):
        labelled = {
            tuple(group.spec.get("labels", {}).items()): group.name for group in cluster.workers
        }
        if sorted(labelled.values()) != ["shards", "workers"] or () in labelled:
            yield (
                f"{cluster.name}: the groups of shards and workers cannot be told apart by "
                f"labels: {labelled}"
            )
        if cluster.holder["kind"] != "RayJob":
            continue
        options = asked(cluster)
        for what in ("shard", "worker"):
            if labelled.get(tuple(options[f"{what}_label"].items())) != f"{what}s":  # type: ignore[attr-defined]
                yield (
                    f"{cluster.name}: --{what}-label {options[f'{what}_label']} is not the "
                    f"label of the group {what}s"
                )
            if not options[f"{what}_cpus"]:
                yield (
                    f"{cluster.name}: without --{what}-cpus the autoscaler sees no need for a node"
                )
        if not options["start_timeout"]:
            yield f"{cluster.name}: without --start-timeout the job fails where a node is late"


def nodes_come_and_go(tree: Tree) -> Iterator[str]:
    """The workers' group is autoscaled up to what the job needs; the shards' group is fixed."""
    for cluster in clusters(tree):
        groups = {group.name: group.spec for group in cluster.workers}
        shards, workers = groups["shards"], groups["workers"]
        if not shards["minReplicas"] == shards["maxReplicas"] >= 2:
            yield (
                f"{cluster.name}: the shards' group must be of one size, and of two nodes "
                "for a standby to be elsewhere"
            )
        if not workers["minReplicas"] < workers["maxReplicas"]:
            yield f"{cluster.name}: the workers' group is not autoscaled"
        if cluster.holder["kind"] == "RayJob":
            per_node = _workers_per_node(cluster)
            if int(str(asked(cluster)["num_workers"])) > per_node * workers["maxReplicas"]:
                yield (
                    f"{cluster.name}: {asked(cluster)['num_workers']} workers do not fit on "
                    f"{workers['maxReplicas']} nodes of {per_node}"
                )
        spread = (
            next(group for group in cluster.workers if group.name == "shards")
            .pod["spec"]
            .get("topologySpreadConstraints", [{}])[0]
        )
        if (
            spread.get("topologyKey") != "kubernetes.io/hostname"
            or spread.get("whenUnsatisfiable") != "DoNotSchedule"
        ):
            yield f"{cluster.name}: two of the shards' nodes may be on one machine"


def shards_fit_on_what_is_left(tree: Tree) -> Iterator[str]:
    """After the loss of a shards' node, the others have CPUs for all shards and standbys."""
    for cluster in (each for each in clusters(tree) if each.holder["kind"] == "RayJob"):
        shards = next(group for group in cluster.workers if group.name == "shards")
        options = asked(cluster)
        left = (shards.spec["minReplicas"] - 1) * quantity(
            shards.container["resources"]["limits"]["cpu"]
        )
        needed = (
            int(str(options["num_shards"]))
            * (1 + int(str(options["replicas"])))
            * float(str(options["shard_cpus"]))
        )
        if needed > left:
            yield (
                f"{cluster.name}: shards and standbys ask for {needed:g} CPUs, without one "
                f"node there are {left:g}"
            )


def resumes(tree: Tree) -> Iterator[str]:
    """A job that is run again continues from a checkpoint outside its cluster."""
    for cluster in clusters(tree):
        if cluster.holder["kind"] == "RayJob":
            options = asked(cluster)
            if (
                options["resume"] != "auto"
                or "://" not in str(options["checkpoint_dir"])
                or not options["save_every"]
            ):
                yield f"{cluster.name}: does not go on from a checkpoint outside of its cluster"


def the_storage_is_known(tree: Tree) -> Iterator[str]:
    """Every node gets the storage's keys from one Secret, whose example names its keys."""
    example = tree.documents(SECRET)[0]
    if not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= example["stringData"].keys() or any(
        example["stringData"].values()
    ):
        yield f"{SECRET}: must name the storage's keys, and hold none"
    for cluster in clusters(tree):
        for group in cluster.groups:
            if {"secretRef": {"name": example["metadata"]["name"]}} not in group.container.get(
                "envFrom", ()
            ):
                yield f"{cluster.name}, {group.name}: has no keys of {example['metadata']['name']}"
        if cluster.holder["metadata"]["namespace"] != example["metadata"]["namespace"]:
            yield f"{cluster.name}: is not in the namespace of its Secret"


def the_policy_covers_all(tree: Tree) -> Iterator[str]:
    """Every pod of ours is selected by the network policy, in both directions."""
    policies = [found for _, found in rendered(tree) if found["kind"] == "NetworkPolicy"]
    if len({str(policy) for policy in policies}) != 1:
        yield "there is not one network policy for all"
    for policy in policies:
        if policy["spec"]["podSelector"].get("matchLabels") != PART or set(
            policy["spec"]["policyTypes"]
        ) != {"Ingress", "Egress"}:
            yield f"{policy['metadata']['name']}: is not about {PART} in both directions"
    for name, pod in pods(tree):
        if not PART.items() <= pod.get("metadata", {}).get("labels", {}).items():
            yield f"{name}: has no label {PART}, so no policy is about it"


def readme_asks_as_the_job_does(tree: Tree) -> Iterator[str]:
    """The job that the README submits by hand requests what the manifest's job does.

    Otherwise it would run on the head.
    """
    job = next(cluster for cluster in clusters(tree) if cluster.folder == "deploy/kubernetes/base")
    given = [
        line
        for line in shell.lines(tree, README)
        if "kubectl exec" in line and "distnadam train" in line
    ]
    if not given:
        yield f"{README}: says no command for deploy/kubernetes/cluster"
    for line in given:
        options, wanted = (
            trained("distnadam train" + line.partition("distnadam train")[2]),
            asked(job),
        )
        if differ := sorted(
            name for name in wanted if name not in OF_A_RUN and options[name] != wanted[name]
        ):
            yield f"{README}: {', '.join(differ)} of {line[:40]} are not those of {job.name}"


def one_cluster_twice(tree: Tree) -> Iterator[str]:
    """The cluster on its own equals the cluster of the job."""
    by_folder = {cluster.folder.rpartition("/")[2]: cluster.spec for cluster in clusters(tree)}
    if by_folder["base"] != by_folder["cluster"]:
        yield "deploy/kubernetes/cluster: is not the cluster of base/rayjob.yaml"


def sizes_follow(tree: Tree) -> Iterator[str]:
    """/dev/shm, object store and memory follow from the plan and the manifest's comment."""
    jobs = {
        cluster.folder: cluster for cluster in clusters(tree) if cluster.holder["kind"] == "RayJob"
    }
    for cluster in clusters(tree):
        run = run_of(jobs.get(cluster.folder, jobs["deploy/kubernetes/base"]), cluster)
        wanted = {
            "head": memory.head_node(run),
            "shards": memory.shard_node(run),
            "workers": memory.worker_node(run),
        }
        for group in cluster.groups:
            node, limit = (
                wanted[group.name],
                quantity(group.container["resources"]["limits"]["memory"]),
            )
            has = (int(group.params.get("object-store-memory", "0")), int(group.shm), int(limit))
            if has != (node.store, node.shm, node.memory):
                yield (
                    f"{cluster.name}, {group.name}: store, /dev/shm and memory are {has}, "
                    f"{node} is what the plan says"
                )


def run_of(job: Cluster, cluster: Cluster) -> PlannedRun:
    """Return the run that a cluster is made for."""
    options, groups = asked(job), {group.name: group.spec for group in cluster.workers}
    annotations = cluster.holder["metadata"]["annotations"]
    workers, each = int(str(options["num_workers"])), _workers_per_node(job)
    return PlannedRun(
        parameters=int(float(annotations["distnadam/parameters"])),
        hosts=-(-workers // each),
        workers_per_host=each,
        shards=int(str(options["num_shards"])),
        replicas=int(str(options["replicas"])),
        shard_hosts=groups["shards"]["minReplicas"],
    )


def _workers_per_node(job: Cluster) -> int:
    workers = next(group for group in job.workers if group.name == "workers")
    return int(
        quantity(workers.container["resources"]["limits"]["cpu"])
        // float(str(asked(job)["worker_cpus"]))
    )
