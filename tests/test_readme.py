"""Every Python block of the README runs as it stands, in an empty directory."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- ray -->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(
        bool(ray), code, id=str(number), marks=[pytest.mark.slow] * bool(ray and number > 1)
    )
    for number, (ray, code) in enumerate(BLOCK.findall((ROOT / "README.md").read_text()))
]


@pytest.mark.parametrize(("needs_ray", "code"), BLOCKS)
def test_a_block_of_the_readme_runs(
    needs_ray: bool,
    code: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if needs_ray:
        request.getfixturevalue("ray_cluster")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_has_a_block_for_every_use() -> None:
    assert len(BLOCKS) == 8
