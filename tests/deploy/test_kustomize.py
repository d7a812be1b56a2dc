"""The rules check what is applied: our rendering equals kubectl's, if kubectl is installed."""

import shutil
import subprocess

import pytest

from tests.deploy.clusters import FOLDERS
from tests.deploy.kustomize import loaded, render
from tests.deploy.tree import ROOT, Tree


@pytest.mark.parametrize("folder", FOLDERS)
def test_our_rendering_is_kubectls(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, whose kustomize this is compared with, is not here")
    printed = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / folder)], capture_output=True, text=True, timeout=60
    )
    assert printed.returncode == 0, printed.stderr

    def named(found: list[dict[str, object]]) -> dict[str, dict[str, object]]:
        return {f"{each['kind']}/{each['metadata']['name']}": each for each in found}  # type: ignore[index]

    assert named(loaded(printed.stdout)) == named(render(Tree.read(), folder))
