"""`upgrade.sh` with a stand-in for kubectl, which writes down what it is asked and can fail."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tree import ROOT

FOLDER, CLUSTER = "overlays/large", "distnadam-digits-abc12"
KUBECTL = f"""#!/bin/sh
echo "$*" >> "$SAID"
[ "$1" != "$FAILS" ] || exit 1
[ "$1" != get ] || printf {CLUSTER}
"""
SAID = [
    f"kustomize {FOLDER}",
    "get rayjob distnadam-digits --output jsonpath={.status.rayClusterName} --namespace distnadam",
    f"exec --namespace distnadam svc/{CLUSTER}-head-svc -- distnadam save distnadam-digits",
    "delete rayjob distnadam-digits --wait --namespace distnadam",
    f"apply --kustomize {FOLDER}",
]


@pytest.mark.parametrize("fails", ["", "kustomize", "get", "exec", "delete", "apply"])
def test_a_job_is_ended_only_once_it_is_saved_and_the_folder_renders(
    fails: str, tmp_path: Path
) -> None:
    kubectl, said = tmp_path / "kubectl", tmp_path / "said"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    done = subprocess.run(
        ["sh", "upgrade.sh", FOLDER],
        cwd=ROOT / "deploy/kubernetes",
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), "FAILS": fails},
        capture_output=True,
        text=True,
        timeout=60,
    )
    asked = [line.split()[0] for line in SAID]
    expected = SAID[: asked.index(fails) + 1] if fails else SAID
    assert said.read_text().splitlines() == expected
    assert (done.returncode == 0) == (not fails)
    assert ("the job is ended, and saved" in done.stderr) == (fails == "apply")


def test_a_folder_that_is_none_asks_for_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "deploy/kubernetes/upgrade.sh"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == f"no kustomization.yaml in {tmp_path}\n"
