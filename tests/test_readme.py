"""Every Python block of the README and the guides runs as it stands, in an empty directory: in this
process, under `nohup` with its input closed, and as a container runs it.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.strangers import NOBODY, as_root

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "distnadam/GUIDE.md", "distnadam/training/TRAINING.md")
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)
"""A block, and what it needs: Ray, or a framework's package."""
_NEEDS = [needs for needs, _ in BLOCK.findall((ROOT / "README.md").read_text())]
ON_RAY = f"README-{_NEEDS.index('ray')}"
"""The block that stands for all on Ray in `make test`, and where each starts a Ray of its own."""
BLOCKS = [
    pytest.param(
        needs,
        code,
        id=(name := f"{Path(page).stem}-{number}"),
        marks=[pytest.mark.slow] if needs and name != ON_RAY else [],
    )
    for page in PAGES
    for number, (needs, code) in enumerate(BLOCK.findall((ROOT / page).read_text()))
]
ELSEWHERE = [
    pytest.param(block.values[1], id=block.id)
    for block in BLOCKS
    if not block.values[0] or block.id == ON_RAY
]


@pytest.mark.parametrize(("needs", "code"), BLOCKS)
def test_a_block_of_a_page_runs(
    needs: str,
    code: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if needs == "ray":
        request.getfixturevalue("ray_cluster")
    elif needs:
        os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported
        pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {"__name__": "page"})


def test_every_page_has_blocks() -> None:
    assert {str(block.id).split("-")[0] for block in BLOCKS} == {Path(page).stem for page in PAGES}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def in_container(run: Path) -> list[str]:
    """Return what begins a command as a container does, for which only `run` and /tmp are writable.

    It is not root (but may read everything, as the interpreter may lie in a closed home), has
    64 MiB of /dev/shm, no home, and a /tmp of its own.
    """
    become = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
    become += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    kept = [shlex.quote(str(path)) for path in (ROOT, sys.prefix, run)]
    script = [
        "set -e",
        "mount --make-rprivate /",
        "mount -t tmpfs tmpfs /mnt",
        *(f"mkdir /mnt/{n}; mount --bind {path} /mnt/{n}" for n, path in enumerate(kept)),
        "mount -t tmpfs -o mode=1777 tmpfs /tmp",
        *(f"mkdir -p {path}; mount --move /mnt/{n} {path}" for n, path in enumerate(kept)),
        "mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm",
        *(f"mount -o remount,bind,ro {path}" for path in ("/", *kept[:2])),
        f"chown {NOBODY}:{NOBODY} {kept[2]}; cd {kept[2]}",
        f'exec {become} "$@"',
    ]
    namespaces = ["--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    return ["unshare", *namespaces, "sh", "-c", "\n".join(script), "sh"]


def run(command: list[str], directory: Path, home: Path) -> str:
    """Run a command that must end well in an environment without settings; return its output."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
    output = directory.with_suffix(".out")
    with output.open("w") as file:
        done = subprocess.run(
            command, cwd=directory, env=environment, stdout=file, stderr=file, timeout=200
        )
    assert done.returncode == 0, output.read_text()
    return output.read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("code", ELSEWHERE)
def test_a_block_runs_under_nohup_without_an_input(code: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(code)
    command = ["sh", "-c", f"exec nohup {sys.executable} block.py <&-"]
    assert "Traceback" not in run(command, tmp_path, tmp_path)


@as_root
@pytest.mark.slow
@pytest.mark.parametrize("code", ELSEWHERE)
def test_a_block_runs_in_a_container(code: str, tmp_path: Path) -> None:
    begin = in_container(tmp_path)
    refused = "for place in / /root /var/tmp; do if touch $place/x 2>&-; then exit 1; fi; done"
    run([*begin, "sh", "-c", refused], tmp_path, Path("/nonexistent"))
    (tmp_path / "block.py").write_text(code)
    command = [*begin, sys.executable, "block.py"]
    assert "Traceback" not in run(command, tmp_path, Path("/nonexistent"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
