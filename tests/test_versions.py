"""The versions of packages that are installed, and of one that is not."""

import numpy as np

from distnadam.versions import CORE_PACKAGES, installed_version


def test_the_version_of_an_installed_package_is_its_own() -> None:
    assert installed_version("numpy") == np.__version__


def test_a_missing_package_has_no_version() -> None:
    assert installed_version("distnadam-has-no-such-package") is None


def test_every_core_package_is_installed_with_this_one() -> None:
    assert all(installed_version(package) for package in CORE_PACKAGES)
