"""Holds a network's switch, and ends all processes in its namespaces when standard input closes.

That happens when the maker of the network closes it or dies. Each line of input is a namespace.
"""

import os
import sys

from tests.hosts.network import in_namespaces, kill_all


def main() -> None:
    """Run the command."""
    os.setsid()  # no Ctrl-C of the maker's terminal ends this before its time
    print("ready", flush=True)
    namespaces = {line.strip() for line in sys.stdin}
    kill_all(
        lambda: in_namespaces(namespaces), but="unshare"
    )  # which buries its host's first process and ends


if __name__ == "__main__":
    main()
