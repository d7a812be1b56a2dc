"""`cluster.sh` with stand-ins for ssh and sudo, which run the hosts' commands on this machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tree import ROOT

SSH = """#!/bin/sh
shift 2
host=$1; shift
echo "$host: $*" >> "$SAID"
export TMPDIR="$REMOTE"
exec sh -c "$*"
"""
SUDO = """#!/bin/sh
[ ! -e "$FAILS" ] || exit 1
[ ! -e "$BROKEN" ] || case "$*" in *"$(cat "$BROKEN")"*) exit 1 ;; esac
case "$1 $2" in
"sh /opt/distnadam/switch.sh") exit ;;
"systemctl is-active") cat "$ACTIVE"; [ "$(cat "$ACTIVE")" = active ] && exit 0 || exit 3 ;;
esac
case $1 in
sh)
    cp -R "$3" "$INSTALLED-$(sed -n 's/^NODE_ADDRESS=//p' "$3/ray.env")"
    echo "${4:-}" > "$UID_GIVEN" ;;
/opt/distnadam/run.sh) shift; exec "$@" ;;
systemctl) ;;
*) exit 1 ;;
esac
"""
PIP = """#!/bin/sh
while [ "$1" != --wheel-dir ]; do shift; done
mkdir -p "$2" && touch "$2/distnadam-2-py3-none-any.whl"
"""


class Site:
    """A copy of the scripts, and what they have run."""

    def __init__(self, directory: Path) -> None:
        self.hosts = directory / "deploy/hosts"
        self.remote = directory / "remote"
        shutil.copytree(ROOT / "deploy/hosts", self.hosts, ignore=shutil.ignore_patterns("token"))
        shutil.copy(ROOT / "constraints.txt", directory)
        self.said = directory / "said"
        self.installed = directory / "installed"
        self.fails = directory / "fails"
        self.uid = directory / "uid"
        self.active = directory / "active"
        self.broken = directory / "broken"
        self.remote.mkdir()
        (directory / "local").mkdir()
        (directory / "bin").mkdir()
        for name, text in {"ssh": SSH, "sudo": SUDO, "pip": PIP}.items():
            (directory / "bin" / name).write_text(text)
            (directory / "bin" / name).chmod(0o755)
        self.env = {
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(directory / "bin/pip"),
            "HOME": str(directory),
        }
        self.env |= {
            "SAID": str(self.said),
            "INSTALLED": str(self.installed),
            "FAILS": str(self.fails),
            "UID_GIVEN": str(self.uid),
            "ACTIVE": str(self.active),
            "BROKEN": str(self.broken),
        }
        self.env |= {"REMOTE": str(self.remote), "TMPDIR": str(directory / "local")}

    def cluster(self, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run the script."""
        return subprocess.run(
            [self.hosts / "cluster.sh", *arguments],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def left(self) -> list[Path]:
        """Return what is in the temporary directories of both machines."""
        return [*self.remote.iterdir(), *(self.remote.parent / "local").iterdir()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize(
    ("command", "prints"),
    [
        (["sh", "-c", "echo hello world; echo again"], "hello world\nagain\n"),
        (
            ["printf", "%s|", "mine here.py:Line", "it's", "", "$HOME", "*", '"', "a\nb"],
            "mine here.py:Line|it's||$HOME|*|\"|a\nb|",
        ),
    ],
)
def test_run_gives_the_host_the_words_that_it_was_given(
    command: list[str], prints: str, site: Site
) -> None:
    done = site.cluster("run", "10.0.0.1", "--", *command)
    assert (done.returncode, done.stdout, done.stderr) == (0, prints, "")


def test_stop_ends_the_run_first_says_so_and_the_head_last(site: Site) -> None:
    done = site.cluster("stop", "10.0.0.1", "10.0.0.2")
    assert done.returncode == 0
    assert "stopping the run on 10.0.0.1" in done.stdout
    said = [line.replace("'", "").split() for line in site.said.read_text().splitlines()]
    ends = [
        ("10.0.0.1:", "distnadam-train"),
        ("10.0.0.2:", "distnadam-node"),
        ("10.0.0.1:", "distnadam-head"),
    ]
    assert said == [
        [host, "sudo", "systemctl", "disable", "--now", f"{unit}.service"] for host, unit in ends
    ]


def test_install_copies_a_wheel_the_hosts_addresses_and_one_token_and_cleans_up(
    site: Site,
) -> None:
    old = site.hosts.parent / "wheel" / "distnadam-1-py3-none-any.whl"
    old.parent.mkdir()
    old.touch()
    done = site.cluster("install", "10.0.0.1", "10.0.0.2", DISTNADAM_UID="731")
    assert done.returncode == 0, done.stderr
    for address in ("10.0.0.1", "10.0.0.2"):
        came = Path(f"{site.installed}-{address}")
        assert [path.name for path in came.glob("*.whl")] == ["distnadam-2-py3-none-any.whl"]
        assert "HEAD_ADDRESS=10.0.0.1\n" in (came / "ray.env").read_text()
        assert "RAY_ADDRESS=10.0.0.1:6379\n" in (came / "train.env").read_text()
        assert (came / "token").read_text() == (site.hosts / "token").read_text()
    assert site.uid.read_text() == "731\n"
    assert site.left() == []


def test_where_installing_fails_the_token_stays_on_no_host(site: Site) -> None:
    site.fails.touch()
    assert site.cluster("install", "10.0.0.1", "10.0.0.2").returncode != 0
    assert "tar" in site.said.read_text()
    assert site.left() == []


def test_add_brings_the_token_of_the_others_to_the_new_host_alone_and_starts_it(site: Site) -> None:
    without = site.cluster("add", "10.0.0.1", "10.0.0.4")
    assert (without.returncode, site.said.exists()) == (1, False)
    assert "add from the copy that the others were installed from" in without.stderr
    (site.hosts / "token").write_text("theirs")
    done = site.cluster("add", "10.0.0.1", "10.0.0.4")
    assert done.returncode == 0, done.stderr
    assert Path(f"{site.installed}-10.0.0.4", "token").read_text() == "theirs"
    assert [path.name for path in site.installed.parent.glob("installed-*")] == [
        "installed-10.0.0.4"
    ]
    assert "HEAD_ADDRESS=10.0.0.1\n" in Path(f"{site.installed}-10.0.0.4", "ray.env").read_text()
    assert (
        "10.0.0.4: sudo 'systemctl' 'enable' '--now' 'distnadam-node.service'"
        in site.said.read_text()
    )


@pytest.mark.parametrize("active", ["active", "inactive"])
def test_upgrade_installs_beside_then_stops_switches_and_starts_what_ran(
    active: str, site: Site
) -> None:
    site.active.write_text(active)
    done = site.cluster("upgrade", "10.0.0.1", "10.0.0.2")
    assert done.returncode == 0, done.stderr
    said = [line.replace("'", "").split(" sudo ")[-1] for line in commands(site)]
    switch = "sh /opt/distnadam/switch.sh next"
    assert said == [
        *["receives beside"] * 2,
        "systemctl is-active distnadam-train.service",
        *[f"systemctl stop distnadam-{unit}.service" for unit in ("train", "node", "head")],
        *[switch] * 2,
        *[f"systemctl start distnadam-{unit}.service" for unit in ("head", "node")],
        *(["systemctl start distnadam-train.service"] if active == "active" else []),
    ]


def test_an_upgrade_that_cannot_be_installed_stops_nothing(site: Site) -> None:
    site.fails.touch()
    done = site.cluster("upgrade", "10.0.0.1", "10.0.0.2")
    assert done.returncode == 1
    assert "it cannot be installed on 10.0.0.1" in done.stderr
    assert "systemctl" not in site.said.read_text()
    assert site.left() == []


@pytest.mark.parametrize("back", [True, False])
def test_an_upgrade_that_does_not_start_goes_back_or_says_where_the_run_is(
    back: bool, site: Site
) -> None:
    site.active.write_text("active")
    site.broken.write_text("switch.sh next" if back else "switch.sh")
    done = site.cluster("upgrade", "10.0.0.1", "10.0.0.2")
    assert done.returncode == 1
    assert "going back to the version before" in done.stderr
    last = commands(site)[-1]
    if back:
        assert last.endswith("'systemctl' 'start' 'distnadam-train.service'")
        assert site.said.read_text().count("'back'") == 2
    else:
        assert "the run is stopped; its newest checkpoint is in the --checkpoint-dir" in done.stderr
        assert "start" not in last


def commands(site: Site) -> list[str]:
    """Return what each host was told, the receiving of files as that."""
    found: list[str] = []
    for line in site.said.read_text().splitlines():
        if line.endswith(" beside"):
            found.append("receives beside")
        elif "sudo 'sh'" in line or "sudo 'systemctl'" in line:
            found.append(line.rstrip())
    return found
