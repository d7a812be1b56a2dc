"""The manifests against KubeRay's schemas, which must be installed, with unknown fields refused."""

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.clusters import clusters
from tests.deploy.rules_machines import closed
from tests.deploy.tree import ROOT, Loader, Tree

FOLDER = Path(os.environ.get("DISTNADAM_CRDS", ROOT / "shared" / "crds"))
FILES = {"RayCluster": "ray.io_rayclusters.v1.7.0.yaml", "RayJob": "ray.io_rayjobs.v1.7.0.yaml"}


@cache
def validator(kind: str) -> Any:
    """Return a validator of a custom resource's schema that also refuses unknown fields."""
    path = next(
        (
            folder / FILES[kind]
            for folder in (FOLDER, ROOT.parent / "shared" / "crds")
            if (folder / FILES[kind]).is_file()
        ),
        None,
    )
    if path is None:
        pytest.skip(
            f"KubeRay's schemas are not here: put {FILES[kind]} into {FOLDER}, or its folder into "
            "DISTNADAM_CRDS"
        )
    text = path.read_text()
    # without the old version, which doubles the length and the time to read it
    old = text.rindex("\n  - ", 0, text.index("\n    name: v1alpha1\n"))
    versions = yaml.load(text[:old], Loader)["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"][
        "openAPIV3Schema"
    ]
    closed(schema)
    return jsonschema.Draft202012Validator(schema)


def complaints(tree: Tree) -> list[str]:
    found = (
        (each.name, error)
        for each in clusters(tree)
        for error in validator(each.holder["kind"]).iter_errors(each.holder)
    )
    return [f"{name}: {error.json_path}: {error.message}" for name, error in found]


def test_every_cluster_fits_kuberays_schema() -> None:
    assert len(clusters(Tree.read())) == 3
    assert complaints(Tree.read()) == []


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("RayJob", lambda spec: spec.update(backofLimit=3), "'backofLimit' was unexpected"),
        (
            "RayJob",
            lambda spec: spec["rayClusterSpec"].pop("headGroupSpec"),
            "'headGroupSpec' is a required property",
        ),
        (
            "RayJob",
            lambda spec: spec["rayClusterSpec"]["headGroupSpec"].pop("template"),
            "'template' is a required property",
        ),
        (
            "RayJob",
            lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
            "'groupName' is a required property",
        ),
        (
            "RayJob",
            lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"),
            "'tokens' is not one of",
        ),
        (
            "RayJob",
            lambda spec: spec.update(ttlSecondsAfterFinished="600"),
            "'600' is not of type 'integer'",
        ),
        (
            "RayJob",
            lambda spec: spec["submitterPodTemplate"]["spec"]["containers"][0].update(cmd=["a"]),
            "'cmd' was unexpected",
        ),
        ("RayCluster", lambda spec: spec.update(rayVersion=2.6), "2.6 is not of type 'string'"),
        (
            "RayCluster",
            lambda spec: spec["workerGroupSpecs"][1].update(minReplica=1),
            "'minReplica' was unexpected",
        ),
        (
            "RayCluster",
            lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            "0 is not of type 'string'",
        ),
        (
            "RayCluster",
            lambda spec: spec["headGroupSpec"]["template"]["spec"].update(volume=[]),
            "'volume' was unexpected",
        ),
        (
            "RayCluster",
            lambda spec: spec["autoscalerOptions"].update(version="v3"),
            "'v3' is not one of",
        ),
    ],
)
def test_a_broken_manifest_does_not_fit(
    kind: str, edit: Callable[[Any], object], message: str
) -> None:
    manifest = copy.deepcopy(
        next(each.holder for each in clusters(Tree.read()) if each.holder["kind"] == kind)
    )
    edit(manifest["spec"])
    assert any(message in error.message for error in validator(kind).iter_errors(manifest))
