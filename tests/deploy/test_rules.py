"""Every rule accepts the deploy files, and refuses a copy that breaks it."""

from collections.abc import Callable, Iterator

import pytest

from tests.deploy import rules_controller, rules_exposure, rules_machines, rules_pods, rules_words
from tests.deploy.tree import Tree

Rule = Callable[[Tree], Iterator[str]]
MODULES = [rules_controller, rules_exposure, rules_machines, rules_pods, rules_words]
DOCKERFILE, COMPOSE, ENV = (
    "deploy/docker/Dockerfile",
    "deploy/docker/compose.yaml",
    "deploy/hosts/ray.env",
)
HEAD, NODE, SCRIPT = (
    "deploy/hosts/distnadam-head.service",
    "deploy/hosts/distnadam-node.service",
    "deploy/hosts/cluster.sh",
)
JOB, CLUSTER = "deploy/kubernetes/base/rayjob.yaml", "deploy/kubernetes/cluster/raycluster.yaml"
TRAIN = "deploy/hosts/distnadam-train.service"
POLICY, NAMESPACE = (
    "deploy/kubernetes/shared/networkpolicy.yaml",
    "deploy/kubernetes/shared/namespace.yaml",
)
SECRET, SIZES = (
    "deploy/kubernetes/secret.example.yaml",
    "deploy/kubernetes/overlays/large/sizes.yaml",
)
AWS, GCP, ONPREM = (f"deploy/launcher/{name}.yaml" for name in ("aws", "gcp", "onprem"))
BOARD, ALERTS = rules_words.BOARD, rules_words.ALERTS
OVERLAY = "deploy/kubernetes/overlays/large/kustomization.yaml"

BROKEN = [
    # the rule, the file, its text, the broken copy's text, a part of the complaint
    ("names", JOB, "name: distnadam-digits", f"name: {'d' * 48}", "at most 47 characters"),
    ("names", CLUSTER, "name: distnadam\n", f"name: {'d' * 54}\n", "at most 53 characters"),
    ("names", CLUSTER, "name: distnadam\n", "name: 1distnadam\n", "not a DNS label"),
    ("authentication", JOB, "mode: token", "mode: disabled", "there is no authentication"),
    (
        "authentication",
        CLUSTER,
        "  authOptions:\n    mode: token\n",
        "",
        "there is no authentication",
    ),
    ("authentication", JOB, "    rayVersion: 2.60.0\n", "", "rayVersion must be given"),
    (
        "authentication",
        JOB,
        "rayVersion: 2.60.0",
        "rayVersion: 2.60",
        "rayVersion must be given, as text",
    ),
    ("authentication", JOB, "rayVersion: 2.60.0", "rayVersion: 2.51.0", "older than"),
    (
        "restart_policy",
        JOB,
        "securityContext: &pod\n",
        "restartPolicy: Always\n          securityContext: &pod\n",
        "Never or unset",
    ),
    ("restart_policy", JOB, "version: v2", "version: v1", "does not ask for autoscaler v2"),
    ("restart_policy", JOB, "RAY_AUTH_MODE\n", "RAY_enable_autoscaler_v2\n", "said twice"),
    (
        "resources_once",
        CLUSTER,
        "  headGroupSpec:\n",
        '  headGroupSpec:\n    resources: {CPU: "0"}\n',
        "both in",
    ),
    (
        "labels",
        JOB,
        "        labels:\n          distnadam/role: workers",
        "        labels:\n          -bad: workers",
        "is no label",
    ),
    (
        "labels",
        JOB,
        "        labels:\n          distnadam/role: workers",
        "        labels:\n          distnadam/role: -bad",
        "-bad is no",
    ),
    (
        "labels",
        CLUSTER,
        'object-store-memory: "738197504"',
        'labels: "a=b"',
        "use the group's labels",
    ),
    ("replicas", JOB, "maxReplicas: 2", "maxReplicas: 1", "not in order"),
    (
        "replicas",
        JOB,
        "      - groupName: workers",
        "      - suspend: true\n        groupName: workers",
        "cannot be suspended",
    ),
    ("finishing", JOB, "  shutdownAfterJobFinishes: true\n", "", "needs shutdownAfterJobFinishes"),
    ("finishing", JOB, "backoffLimit: 5", "backoffLimit: 0", "not retried"),
    (
        "finishing",
        JOB,
        "submissionMode: K8sJobMode",
        "submissionMode: InteractiveMode",
        "refused with InteractiveMode",
    ),
    (
        "finishing",
        JOB,
        "  backoffLimit",
        "  clusterSelector: {ray.io/cluster: distnadam}\n  backoffLimit",
        "no cluster of its own",
    ),
    ("finishing", JOB, "  backoffLimit", "  suspend: true\n  backoffLimit", "does not run"),
    (
        "finishing",
        JOB,
        "  backoffLimit",
        "  deletionStrategy: {onSuccess: {policy: DeleteSelf}}\n  backoffLimit",
        "needs a feature gate",
    ),
    (
        "no_gates",
        JOB,
        "    rayVersion",
        "    networkPolicy: {mode: DenyAll}\n    rayVersion",
        "need a feature gate",
    ),
    ("no_gates", NAMESPACE, "kind: Namespace", "kind: RayService", "nothing is served"),
    (
        "token_in_docker",
        DOCKERFILE,
        "ENV RAY_AUTH_MODE=token",
        "ENV",
        "does not set RAY_AUTH_MODE=token",
    ),
    ("token_in_docker", COMPOSE, "    RAY_AUTH_MODE: token\n", "", "node-1 has no RAY_AUTH_MODE"),
    ("token_on_hosts", ENV, "RAY_AUTH_MODE=token\n", "", "does not set RAY_AUTH_MODE=token"),
    (
        "token_on_hosts",
        NODE,
        "EnvironmentFile=/etc/distnadam/ray.env\n",
        "",
        "does not read ray.env",
    ),
    (
        "token_in_launcher",
        AWS,
        "RAY_AUTH_MODE=token ray start --address",
        "ray start --address",
        "without RAY_AUTH_MODE=token",
    ),
    ("token_in_pods", JOB, "RAY_AUTH_MODE\n", "RAY_AUTH\n", "has no RAY_AUTH_MODE: token"),
    (
        "no_secret_inside",
        COMPOSE,
        "${RAY_AUTH_TOKEN:?run ./secrets.sh first}",
        "0123456789abcdef",
        "holds a secret",
    ),
    (
        "no_secret_inside",
        ENV,
        "RAY_AUTH_MODE=token",
        "RAY_AUTH_MODE=disabled",
        "switches the token off",
    ),
    ("no_open_address", NODE, "${NODE_ADDRESS}", "0.0.0.0", "0.0.0.0"),
    (
        "no_open_address",
        POLICY,
        "    - from: # Prometheus\n",
        "    - {}\n    - from:\n",
        "lets anybody in",
    ),
    (
        "no_open_address",
        POLICY,
        "- from: # Prometheus\n",
        "- from: [{ipBlock: {cidr: 10.0.0.0/8}}]\n    - from:\n",
        "lets anybody in",
    ),
    (
        "dashboard_is_local",
        HEAD,
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=10.0.0.1",
        "not on 127.0.0.1",
    ),
    ("dashboard_is_local", GCP, "--dashboard-host=127.0.0.1 ", "", "not on 127.0.0.1"),
    ("ports_are_local", COMPOSE, "127.0.0.1:9090:9090", "9090:9090", "not 127.0.0.1's alone"),
    ("ports_are_local", COMPOSE, "internal: true", "internal: false", "not internal"),
    ("ports_are_local", COMPOSE, "  init: true", "  network_mode: host", "not kept apart"),
    (
        "pods_are_closed",
        JOB,
        "securityContext: &pod\n",
        "hostNetwork: true\n          securityContext: &pod\n",
        "/hostNetwork opens",
    ),
    (
        "pods_are_closed",
        CLUSTER,
        "  headGroupSpec:\n",
        "  headGroupSpec:\n    serviceType: LoadBalancer\n",
        "/serviceType opens",
    ),
    ("clouds_are_closed", AWS, "SecurityGroupIds", "Groups", "opens port 22 to the world"),
    (
        "clouds_are_closed",
        GCP,
        "use_internal_ips: true",
        "use_internal_ips: false",
        "public addresses",
    ),
    *(
        ("shards_listen_at_known_ports", path, "--port-range 7000 7063", "", "shards listen at any")
        for path in (JOB, SIZES, "deploy/hosts/train.env", "deploy/README.md")
    ),
    (
        "shards_listen_at_known_ports",
        JOB,
        "--port-range 7000 7063",
        "--port-range 7000 8000",
        "not --port-range 7000 7063",
    ),
    (
        "only_nodes_reach_shards",
        POLICY,
        "        - port: 8080\n          protocol: TCP\n",
        "        - port: 6000\n          endPort: 8080\n          protocol: TCP\n",
        "ingress opens shards' ports beyond the nodes",
    ),
    (
        "only_nodes_reach_shards",
        POLICY,
        "        - port: 6443\n          protocol: TCP\n",
        "        - port: 6443\n          endPort: 7000\n          protocol: TCP\n",
        "egress opens shards' ports beyond the nodes",
    ),
    (
        "only_nodes_reach_shards",
        POLICY,
        "          endPort: 7063\n",
        "          endPort: 7062\n",
        "ingress lets nodes reach each other at [(6379, 6383), (7000, 7062)",
    ),
    *(
        ("ray_takes_known_ports", path, flag, "", f"ray start does not say {flag}")
        for path, flag in (
            (NODE, "--node-manager-port=6380"),
            (COMPOSE, "--max-worker-port=19999"),
            ("deploy/launcher/aws.yaml", "--object-manager-port=6381"),
        )
    ),
    (
        "ray_takes_known_ports",
        JOB,
        'runtime-env-agent-port: "6382"',
        'runtime-env-agent-port: "6392"',
        "ray start does not say --runtime-env-agent-port=6382",
    ),
    (
        "only_nodes_reach_shards",
        COMPOSE,
        "127.0.0.1:9090:9090",
        "127.0.0.1:7000:7000",
        "publishes a shard's port",
    ),
    ("image_is_pinned_and_unprivileged", DOCKERFILE, "USER 1000:1000\n", "", "as user root"),
    ("image_is_pinned_and_unprivileged", DOCKERFILE, "USER 1000:1000", "USER ray", "give a number"),
    (
        "image_is_pinned_and_unprivileged",
        DOCKERFILE,
        "--constraint /wheel/constraints.txt ",
        "",
        "without constraints.txt",
    ),
    (
        "image_is_pinned_and_unprivileged",
        DOCKERFILE,
        "COPY --from=build",
        "COPY",
        "does not take the one that it built",
    ),
    ("image_is_pinned_and_unprivileged", DOCKERFILE, "metrics,", "", "lacks the extras"),
    ("compose_is_known", COMPOSE, "  restart:", "  restrat:", "unknown ['restrat']"),
    (
        "compose_is_known",
        COMPOSE,
        "../monitoring/alerts.yml",
        "../monitoring/alarms.yml",
        "which is not there",
    ),
    (
        "compose_is_known",
        COMPOSE,
        "networks: [cluster, outside]",
        "networks: [clusters]",
        "networks that are not described",
    ),
    (
        "compose_is_known",
        COMPOSE,
        "  storage:\n    image",
        "  store:\n    image",
        "has no ['storage']",
    ),
    ("compose_is_known", COMPOSE, "\nvolumes:", "\nvolume: {}\nvolumes:", "unknown ['volume']"),
    (
        "prometheus_finds_the_nodes",
        "deploy/monitoring/targets/compose.yml",
        "node-2:8080",
        "node-2:8081",
        "nodes export at",
    ),
    ("compose_sizes_follow", COMPOSE, "shm_size: 512mb", "shm_size: 64mb", "is what the plan says"),
    ("units_are_complete", HEAD, "${NODE_LABELS}", "${LABELS}", "nobody sets ['LABELS']"),
    ("units_are_complete", NODE, "ray start --block", "ray start", "ends at once without --block"),
    ("units_are_complete", NODE, "/opt/distnadam/venv/bin/ray", "ray", "systemd wants a path"),
    ("units_are_complete", HEAD, "User=distnadam\n", "", "runs as root"),
    *(
        ("units_survive_a_reboot", unit, "WantedBy=multi-user.target\n", "", "after a reboot")
        for unit in (HEAD, NODE, TRAIN)
    ),
    ("units_survive_a_reboot", TRAIN, "[Install]\n", "", "after a reboot"),
    *(
        (
            "units_find_our_commands",
            unit,
            "Environment=PATH=/opt/distnadam/venv/bin:",
            "Environment=PATH=",
            "our commands",
        )
        for unit in (HEAD, NODE, TRAIN)
    ),
    ("the_run_ends_before_the_head", TRAIN, "PartOf=distnadam-head.service\n", "", "has no PartOf"),
    ("the_run_ends_before_the_head", TRAIN, "After=distnadam-head.service\n", "", "has no After"),
    (
        "the_run_ends_before_the_head",
        TRAIN,
        "Wants=",
        "BindsTo=",
        "from going on after its head has died",
    ),
    (
        "the_run_ends_before_the_head",
        SCRIPT,
        "disable --now distnadam-train.service",
        "stop distnadam-train.service",
        "first the run",
    ),
    (
        "launcher_fits_its_schema",
        AWS,
        "max_workers: 10",
        "max_workers: 10\ninitial_workers: 2",
        "initial_workers",
    ),
    ("launcher_fits_its_schema", GCP, "pull_before_run", "pull", "'pull' was unexpected"),
    ("launcher_fits_its_schema", ONPREM, "worker_ips", "workers_ips", "workers_ips"),
    ("launcher_takes_it", AWS, "head_node_type: head", "head_node_type: heads", "head_node_type"),
    ("launcher_takes_it", GCP, "max_workers: 10", "max_workers: 1", "max_workers"),
    ("launcher_installs_nothing_else", AWS, "\nsetup_commands: []", "", "to Ray's defaults"),
    (
        "launcher_installs_nothing_else",
        GCP,
        "  image: registry.example.com/distnadam:0.1.0\n",
        "",
        "neither an image nor a command",
    ),
    (
        "launcher_installs_nothing_else",
        ONPREM,
        "--constraint ~/distnadam-wheel/constraints.txt",
        "",
        "without constraints.txt",
    ),
    (
        "launcher_groups_are_labelled",
        GCP,
        "distnadam/role: workers",
        "distnadam/role: shards",
        "workers has the labels",
    ),
    (
        "requests_are_limits",
        JOB,
        "cpu: 500m\n              memory: 512Mi\n            limits",
        "cpu: 1m\n            limits",
        "submitter",
    ),
    ("overlays_apply", JOB, "name: distnadam-digits", "name: digits", "no resource is"),
    (
        "overlays_apply",
        SIZES,
        "/workerGroupSpecs/1/rayStartParams",
        "/workerGroupSpecs/2/rayStartParams",
        "RayJob has nothing at",
    ),
    (
        "overlays_apply",
        SIZES,
        "/resources/limits/memory",
        "/resources/limit/memory",
        "RayJob has nothing at",
    ),
    (
        "overlays_apply",
        OVERLAY,
        "registry.example.com/distnadam\n",
        "registry.example.com/nadam\n",
        "no container's image is",
    ),
    (
        "overlays_apply",
        OVERLAY,
        "../../base",
        "../../bases",
        "deploy/kubernetes/bases has no kustomization.yaml",
    ),
    (
        "overlays_apply",
        OVERLAY,
        "resources:",
        "namePrefix: a\nresources:",
        "unknown ['namePrefix']",
    ),
    (
        "requests_are_limits",
        CLUSTER,
        "memory: 1Gi\n      limits",
        "memory: 2Gi\n      limits",
        "autoscaler: requests are not limits",
    ),
    ("nobody_is_root", JOB, "runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
    ("nobody_is_root", JOB, "drop: [ALL]", "drop: [NET_RAW]", "keeps privileges"),
    ("nothing_on_the_head", JOB, 'num-cpus: "0"', 'num-cpus: "2"', "the head has no num-cpus"),
    (
        "groups_are_selected",
        JOB,
        "--shard-label distnadam/role=shards",
        "--shard-label role=shards",
        "not the label of the group shards",
    ),
    (
        "groups_are_selected",
        JOB,
        "        labels:\n          distnadam/role: shards\n",
        "",
        "cannot be told apart",
    ),
    ("groups_are_selected", JOB, "--worker-cpus 1", "--worker-cpus 0", "sees no need for a node"),
    ("groups_are_selected", JOB, "--start-timeout 900", "", "where a node is late"),
    ("nodes_come_and_go", JOB, "minReplicas: 2", "minReplicas: 1", "must be of one size"),
    ("nodes_come_and_go", JOB, "minReplicas: 0", "minReplicas: 8", "is not autoscaled"),
    (
        "nodes_come_and_go",
        JOB,
        "--workers 4",
        "--workers 17",
        "17 workers do not fit on 8 nodes of 2",
    ),
    (
        "nodes_come_and_go",
        JOB,
        "whenUnsatisfiable: DoNotSchedule",
        "whenUnsatisfiable: ScheduleAnyway",
        "may be on one machine",
    ),
    (
        "shards_fit_on_what_is_left",
        JOB,
        'cpu: "4"',
        'cpu: "2"',
        "ask for 4 CPUs, without one node there are 2",
    ),
    ("resumes", JOB, "--resume auto", "--resume never", "does not go on from a checkpoint"),
    ("resumes", JOB, "s3://distnadam/digits", "/tmp/digits", "does not go on from a checkpoint"),
    (
        "the_storage_is_known",
        JOB,
        "name: distnadam-storage",
        "name: storage",
        "has no keys of distnadam-storage",
    ),
    (
        "the_storage_is_known",
        SECRET,
        'AWS_ACCESS_KEY_ID: ""',
        'AWS_ACCESS_KEY_ID: "AKIA"',
        "and hold none",
    ),
    (
        "the_storage_is_known",
        SECRET,
        "namespace: distnadam",
        "namespace: default",
        "not in the namespace",
    ),
    (
        "the_policy_covers_all",
        JOB,
        "app.kubernetes.io/part-of",
        "app.kubernetes.io/part",
        "so no policy is about it",
    ),
    (
        "the_policy_covers_all",
        POLICY,
        "policyTypes: [Ingress, Egress]",
        "policyTypes: [Ingress]",
        "in both directions",
    ),
    (
        "readme_asks_as_the_job_does",
        "deploy/README.md",
        "--worker-label distnadam/role=workers --start",
        "--start",
        "worker_label of",
    ),
    (
        "readme_asks_as_the_job_does",
        "deploy/README.md",
        "kubectl exec",
        "kubectl exac",
        "says no command",
    ),
    (
        "one_cluster_twice",
        CLUSTER,
        "idleTimeoutSeconds: 300",
        "idleTimeoutSeconds: 60",
        "is not the cluster of",
    ),
    ("sizes_follow", JOB, "sizeLimit: 768Mi", "sizeLimit: 64Mi", "is what the plan says"),
    ("sizes_follow", JOB, "--workers 4", "--workers 8", "is what the plan says"),
    ("sizes_follow", SIZES, "value: 13824Mi", "value: 8Gi", "is what the plan says"),
    ("sizes_follow", CLUSTER, "medium: Memory", 'medium: ""', "is what the plan says"),
    (
        "one_ray_version",
        JOB,
        "rayVersion: 2.60.0",
        "rayVersion: 2.59.0",
        "Ray 2.59.0, but 2.60.0 is tested",
    ),
    (
        "one_ray_version",
        ONPREM,
        "*.whl | head -1)[",
        "*.whl | head -1) ray==2.59.0 [",
        "Ray 2.59.0",
    ),
    ("one_ray_version", "constraints.txt", "ray==2.60.0", "ray==2.60.1", "but 2.60.1 is tested"),
    ("pinned_images", COMPOSE, "prom/prometheus:v3.5.0", "prom/prometheus:latest", "not pinned"),
    ("pinned_images", DOCKERFILE, "python:3.11.14-slim-bookworm", "python", "not pinned"),
    ("pinned_images", JOB, "distnadam:0.1.0", "distnadam:0.2.0", "not of the package's version"),
    ("pinned_images", OVERLAY, "newTag: 0.1.0", "newTag: main", "not pinned"),
    (
        "commands_that_exist",
        JOB,
        "--save-every 1000",
        "--save-each 1000",
        "No such option '--save-each'",
    ),
    ("commands_that_exist", SIZES, "--resume auto", "--resume maybe", "'maybe' is not one of"),
    (
        "commands_that_exist",
        JOB,
        "object-store-memory",
        "object-store-size",
        "No such option '--object-store-size'",
    ),
    (
        "commands_that_exist",
        HEAD,
        "--dashboard-host",
        "--dashboard-hosts",
        "No such option '--dashboard-hosts'",
    ),
    (
        "commands_that_exist",
        ENV,
        "RAY_DASHBOARD=true",
        "RAY_DASHBOARD=perhaps",
        "'perhaps' is not a valid boolean",
    ),
    (
        "commands_that_exist",
        COMPOSE,
        '"health-check"',
        '"healthcheck"',
        "No such command 'healthcheck'",
    ),
    ("commands_that_exist", DOCKERFILE, '"doctor"', '"doktor"', "No such command 'doktor'"),
    (
        "commands_that_exist",
        AWS,
        "--metrics-export-port=8080",
        "--metrics-export-port=http",
        "'http' is not a valid integer",
    ),
    (
        "commands_that_exist",
        SCRIPT,
        "run.sh ray status",
        "run.sh ray state",
        "No such command 'state'",
    ),
    (
        "commands_that_exist",
        "deploy/README.md",
        "distnadam train",
        "distnadam trian",
        "No such command 'trian'",
    ),
    (
        "metrics_that_exist",
        BOARD,
        "ray_distnadam_queue_depth",
        "ray_distnadam_queue_length",
        "nothing exports ray_distnadam_queue_length",
    ),
    (
        "metrics_that_exist",
        ALERTS,
        "save_seconds_bucket",
        "save_seconds",
        "nothing exports ray_distnadam_save_seconds",
    ),
    ("metrics_that_exist", ALERTS, "up{job", "upp{job", "nothing exports upp"),
    (
        "tags_that_exist",
        BOARD,
        "optimizer, transport, direction",
        "optimizer, transport, way",
        "['way']",
    ),
    ("tags_that_exist", ALERTS, "by (optimizer, le)", "by (name, le)", "['name']"),
    (
        "metrics_on_the_board",
        BOARD,
        "ray_distnadam_shard_imbalance",
        "up",
        "does not show ['distnadam_shard_imbalance']",
    ),
]


def rules() -> dict[str, Rule]:
    """Return every rule by name: each function of a rules module from a tree to complaints."""
    return {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if callable(value)
        and value.__module__ == module.__name__
        and value.__annotations__.get("return") == Iterator[str]
    }


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.read()


@pytest.mark.parametrize("name", rules())
def test_the_deploy_files_keep_every_rule(name: str, tree: Tree) -> None:
    assert list(rules()[name](tree)) == []


@pytest.mark.parametrize(
    ("name", "path", "old", "new", "message"),
    BROKEN,
    ids=[f"{rule[0]}-{i}" for i, rule in enumerate(BROKEN)],
)
def test_a_broken_copy_is_refused_by_its_rule(
    name: str, path: str, old: str, new: str, message: str, tree: Tree
) -> None:
    complaints = list(rules()[name](tree.edited(path, old, new)))
    assert any(message in rejection for rejection in complaints), complaints


def test_every_rule_has_a_copy_that_breaks_it() -> None:
    assert rules().keys() == {broken[0] for broken in BROKEN}
