"""systemd accepts the units, a shell the scripts, and secrets are readable by their owner alone."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.tree import ROOT, Tree
from tests.deploy.units import Unit

UNITS = sorted((ROOT / "deploy" / "hosts").glob("*.service"))
SCRIPTS = sorted((ROOT / "deploy").rglob("*.sh"))


def verify(folder: Path, unit: Path, text: str) -> str:
    """Return systemd's complaints about a unit whose program exists."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze, which reads units, is not here")
    at = folder / unit.name
    at.write_text(text.replace("/opt/distnadam/venv/bin/", str(Path(sys.executable).parent) + "/"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(at)], capture_output=True, text=True, timeout=60
    )
    return "\n".join(line for line in done.stderr.splitlines() if unit.name in line)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_unit_and_not_a_broken_one(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    assert verify(tmp_path, unit, text) == ""
    assert "Restrat" in verify(tmp_path, unit, text.replace("Restart=", "Restrat="))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_shell_reads_the_script(script: Path) -> None:
    done = subprocess.run(["sh", "-n", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text().startswith("#!/bin/sh\n")
    assert "\nset -eu\n" in script.read_text()


def test_the_scripts_say_how_they_are_used() -> None:
    done = subprocess.run(
        [ROOT / "deploy/hosts/cluster.sh"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "./cluster.sh install 10.0.0.1" in done.stderr


def test_composes_secrets_are_all_made_once_and_readable_by_their_owner_alone(
    tmp_path: Path,
) -> None:
    shutil.copy(ROOT / "deploy/docker/secrets.sh", tmp_path)
    subprocess.run([tmp_path / "secrets.sh"], check=True, timeout=60)
    made = tmp_path / ".env"
    first = made.read_text()
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    subprocess.run([tmp_path / "secrets.sh"], check=True, timeout=60)
    assert made.read_text() == first
    names = {line.partition("=")[0]: line.partition("=")[2] for line in first.splitlines()}
    assert all(len(value) >= 20 for value in names.values())
    for name in names:
        assert f"${{{name}" in Tree.read().texts["deploy/docker/compose.yaml"]
    assert len(names) == len(
        {
            part.split("}")[0].split(":")[0]
            for part in Tree.read().texts["deploy/docker/compose.yaml"].split("${")[1:]
        }
    )


def test_units_are_started_again_where_ray_died() -> None:
    for name in ("head", "node", "train"):
        text = (ROOT / f"deploy/hosts/distnadam-{name}.service").read_text()
        service = Unit.parse(text)
        assert service.values("Service", "Restart")[0] in ("always", "on-failure")
        kept = " ".join(
            status
            for key in ("SuccessExitStatus", "RestartPreventExitStatus")
            for status in service.values("Service", key)
        ).split()
        assert str(os.EX_TEMPFAIL) not in kept
        assert service.values("Unit", "StartLimitIntervalSec") == ["0"]  # however often
