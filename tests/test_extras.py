"""What an error says to install works where no index has this package."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from distnadam.extras import how_to_install

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OF_USERS = ["digits", "fused", "gcs", "jax", "keras", "metrics", "optax", "plot", "report", "s3"]
OF_USERS += ["tensorboard", "torch"]


@pytest.mark.parametrize("extra", OF_USERS)
def test_an_extra_is_installed_by_the_packages_that_it_needs(extra: str) -> None:
    said = how_to_install(extra)
    needed = [re.match(r"[\w.-]+", each)[0] for each in EXTRAS[extra]]  # type: ignore[index]
    assert said.startswith("pip install ")
    assert all(name in said for name in needed)
    assert "distnadam" not in said


def test_a_package_is_installed_in_a_version_that_works() -> None:
    assert "<" in how_to_install("ray")
    assert re.fullmatch(r"pip install 'scikit-learn>=[\d.]+'", how_to_install("scikit-learn"))
    assert how_to_install("nothing") == "pip install nothing"  # of no extra


def test_where_it_runs_from_its_source_the_extra_has_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", gone)
    assert how_to_install("torch") == "pip install '.[torch]', where distnadam's pyproject.toml is"


def test_nothing_names_an_install_that_no_index_has() -> None:
    of_users = [*(ROOT / "distnadam").rglob("*.py"), *(ROOT / "distnadam").rglob("*.md")]
    of_users += [ROOT / "README.md", *(ROOT / "benchmarks").rglob("*.py")]
    assert [path for path in of_users if "distnadam[" in path.read_text()] == []
