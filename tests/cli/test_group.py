"""How every command ends: one sentence and exit code 1 for an error, 130 after Ctrl-C."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from distnadam.cli.group import exit_on_error, main, plain_console
from distnadam.errors import CheckpointError


def test_an_error_is_printed_with_its_notes_and_exits_with_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = CheckpointError("run/manifest.msgpack: its checksum does not match its contents")
    error.add_note("a note")
    with pytest.raises(SystemExit) as raised, exit_on_error():
        raise error
    assert raised.value.code == 1
    assert capsys.readouterr() == (
        "",
        "distnadam: run/manifest.msgpack: its checksum does not match its contents\na note\n",
    )


def test_ctrl_c_exits_with_130_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, exit_on_error():
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_an_error_of_another_kind_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_error():
        raise ZeroDivisionError


def test_the_console_prints_brackets_and_colons_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain_console().print("[bold]runs[/bold] :smile: 3")
    assert capsys.readouterr().out == "[bold]runs[/bold] :smile: 3\n"


def test_every_command_describes_itself_and_its_options() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    assert "SHARDS shards, between two steps." in " ".join(shown.output.split()), "none is cut"
    for name, command in main.commands.items():
        assert command.help, name
        assert CliRunner().invoke(main, [name, "-h"]).exit_code == 0
        for parameter in command.params:
            if getattr(parameter, "opts", [""])[0].startswith("--"):
                assert parameter.help, f"{name} {parameter.name}"  # type: ignore[attr-defined]


def test_a_ctrl_c_while_the_command_is_imported_is_no_traceback() -> None:
    code = (
        "import signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Interrupting(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'distnadam.cli.training':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from distnadam.__main__ import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
