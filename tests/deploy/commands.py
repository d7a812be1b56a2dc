"""The commands of ray and distnadam in shell text, checked against the installed command lines."""

import re
import shlex
from collections.abc import Iterator
from functools import cache

import click

OURS = {"ray", "distnadam"}
STARTS = {"exec", "sudo", "do", "then", "if", "!", "||", "&&"}


def commands(text: str) -> Iterator[list[str]]:
    """Yield every command of ours in shell text, as words; what follows `--` is another one."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        try:
            words = list(lexer)
        except ValueError:  # a quotation over several lines; no command of ours has one
            continue
        yield from _in_words(words)


def _in_words(words: list[str]) -> Iterator[list[str]]:
    for at, word in enumerate(words):
        before = words[at - 1] if at else ";"
        begins = before in STARTS or re.fullmatch(r"[();<>|&]+|--|\w+=.*|.*/run\.sh", before)
        if word.rpartition("/")[2] not in OURS or "=" in word or not begins:
            continue
        end = next(
            (i for i in range(at, len(words)) if re.fullmatch(r"[();<>|&]+", words[i])), len(words)
        )
        yield [word.rpartition("/")[2], *words[at + 1 : end]]


@cache
def entry_point(name: str) -> click.Command:
    """Return the command line of that name."""
    if name == "ray":
        from ray.scripts.scripts import cli

        ray: click.Command = cli
        return ray
    from distnadam.cli import main

    return main


def refused(command: list[str]) -> str | None:
    """Return why the installed command line refuses a command, or None; nothing is run."""
    name, *arguments = command
    at: click.Command = entry_point(name)
    try:
        context = at.make_context(name, list(arguments))
        while isinstance(at, click.Group):
            found, sub, rest = at.resolve_command(
                context, [*getattr(context, "_protected_args", ()), *context.args]
            )
            if sub is None or found is None:
                return "it has no such command"
            at, context = sub, sub.make_context(found, rest, parent=context)
    except click.exceptions.Exit:
        return None  # such as --help
    except click.ClickException as error:
        return error.format_message()
    return None
