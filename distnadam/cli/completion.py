"""The command `completion`, which prints what a shell completes command lines with."""

import click
from click.shell_completion import get_completion_class

from distnadam.cli.group import main

_BASH = r"""_distnadam_completion() {
    local type value
    local -a found=()
    while IFS=',' read -r type value; do
        case "$type" in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) found+=("$value") ;;
        esac
    done < <(
        IFS=$'\n'
        env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \
            _DISTNADAM_COMPLETE=bash_complete "$1"
    )
    COMPREPLY=("${found[@]}")
}

complete -o nosort -F _distnadam_completion distnadam
"""
"""Like click's own, which leaves words unquoted."""


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion of SHELL: bash, zsh or fish.

    For bash add to ~/.bashrc, and for zsh, with its name, to ~/.zshrc:

    \b
        eval "$(distnadam completion bash)"

    For fish:

    \b
        distnadam completion fish > ~/.config/fish/completions/distnadam.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    theirs = kind(main, {}, "distnadam", "_DISTNADAM_COMPLETE").source()
    click.echo(_BASH if shell == "bash" else theirs)
