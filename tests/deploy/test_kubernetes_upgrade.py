"""`upgrade.sh` with a stand-in for kubectl, which writes down what it is asked and can fail."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tree import ROOT

FOLDER, CLUSTER = "overlays/large", "distnadam-digits-abc12"
KUBECTL = """#!/bin/sh
echo "$*" >> "$SAID"
[ "$1" != "$FAILS" ] || exit 1
[ "$1" != get ] || printf "$CLUSTER"
"""
SAID = [
    f"kustomize {FOLDER}",
    "get rayjob distnadam-digits --output jsonpath={.status.rayClusterName} --namespace distnadam",
    f"exec --namespace distnadam svc/{CLUSTER}-head-svc -- distnadam save distnadam-digits",
    "delete rayjob distnadam-digits --cascade=foreground --wait --namespace distnadam",
    f"apply --kustomize {FOLDER}",
]


def upgrade(
    tmp_path: Path, fails: str, cluster: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script; return how it ended, and what it asked kubectl."""
    kubectl, said = tmp_path / "kubectl", tmp_path / "said"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    how = {"SAID": str(said), "FAILS": fails, "CLUSTER": cluster}
    done = subprocess.run(
        ["sh", "upgrade.sh", FOLDER],
        cwd=ROOT / "deploy/kubernetes",
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | how,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, said.read_text().splitlines()


@pytest.mark.parametrize("fails", ["", "kustomize", "get", "exec", "delete", "apply"])
def test_a_job_is_ended_only_once_it_is_saved_and_the_folder_renders(
    fails: str, tmp_path: Path
) -> None:
    done, said = upgrade(tmp_path, fails, CLUSTER)
    asked = [line.split()[0] for line in SAID]
    assert said == (SAID[: asked.index(fails) + 1] if fails else SAID)
    assert (done.returncode == 0) == (not fails)
    assert ("the job is ended, and saved" in done.stderr) == (fails == "apply")


def test_a_job_without_a_cluster_yet_is_left_alone(tmp_path: Path) -> None:
    done, said = upgrade(tmp_path, "", "")
    assert done.returncode == 1 and said == SAID[:2]
    assert done.stderr == "the job distnadam-digits has no cluster yet, and nothing to save\n"


def test_a_folder_that_is_none_asks_for_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "deploy/kubernetes/upgrade.sh"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == f"no kustomization.yaml in {tmp_path}\n"
