"""The tests read units as systemd does: repeated keys, environment files, variables."""

from pathlib import Path

import pytest

from tests.deploy.tree import ROOT
from tests.deploy.units import PROGRAMS, Unit, assignments, words

UNIT = """
# a comment
[Unit]
Description=One
After=a.target
After=b.target

[Service]
Environment=PATH=/first WHERE=unit "WORDS=two words"
Environment=PATH=/second
EnvironmentFile=/etc/file.env
EnvironmentFile=-/etc/absent.env
ExecStart=/bin/false
ExecStart=
ExecStart=/bin/program --where=${WHERE} \\
    # a comment within
    --empty=${NOTHING} $MANY $NOTHING
"""
FILE = "; a comment\nWHERE=file\nMANY=a 'b c' --d\nQUOTED=\"x y\"\n"


def test_keys_may_be_repeated_and_an_empty_value_takes_back_those_before() -> None:
    unit = Unit.parse(UNIT)
    assert unit.values("Unit", "After") == ["a.target", "b.target"]
    assert unit.values("Service", "After") == []
    assert len(unit.values("Service", "ExecStart")) == 1


def test_files_override_the_units_environment_and_only_dashed_ones_may_be_absent() -> None:
    env = Unit.parse(UNIT).environment({"/etc/file.env": FILE})
    assert env == {
        "PATH": "/second",
        "WORDS": "two words",
        "WHERE": "file",
        "MANY": "a 'b c' --d",
        "QUOTED": "x y",
    }
    with pytest.raises(KeyError):
        Unit.parse(UNIT).environment({})


def test_a_variable_in_braces_stays_in_one_word_and_one_without_is_split_into_words() -> None:
    unit = Unit.parse(UNIT)
    command = unit.command(unit.environment({"/etc/file.env": FILE}))
    assert command == ["/bin/program", "--where=file", "--empty=", "a", "b c", "--d"]
    assert words("/bin/echo a$HOME ${MANY} $$HOME", {"HOME": "/", "MANY": "a b"}) == [
        "/bin/echo",
        "a$HOME",
        "a b",
        "$HOME",
    ]


@pytest.mark.parametrize(
    "unit", sorted((ROOT / "deploy/hosts").glob("*.service")), ids=lambda path: path.name
)
def test_a_unit_of_ours_starts_a_program_of_a_given_directory(unit: Path, tmp_path: Path) -> None:
    files = {
        f"/etc/distnadam/{name}.env": (ROOT / f"deploy/hosts/{name}.env").read_text()
        for name in ("ray", "train")
    }
    read = Unit.of_hosts(unit, tmp_path)
    env = read.environment(files)
    assert Path(read.command(env)[0]).parent == tmp_path
    assert env["PATH"].split(":")[0] == str(tmp_path)
    assert env["RAY_AUTH_TOKEN_PATH"] == "/etc/distnadam/token"
    assert PROGRAMS not in " ".join(read.command(env))


def test_the_settings_that_hosts_begin_with_are_ones_that_a_shell_reads_alike() -> None:
    """A shell reads `ray.env` as systemd does; a value with a blank would be a command there."""
    for value in assignments((ROOT / "deploy/hosts/ray.env").read_text()).values():
        assert len(value.split()) <= 1
