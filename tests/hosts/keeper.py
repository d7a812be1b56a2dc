"""Holds a network's switch, and ends all processes in its namespaces when standard input closes.

That happens when the maker of the network closes it or dies. Each line of input is a namespace.
"""

import os
import sys

from tests.hosts.network import in_namespaces, kill_all


def main() -> None:
    """Run the command."""
    os.setsid()  # so that Ctrl-C in the maker's terminal does not end this process first
    print("ready", flush=True)
    namespaces = {line.strip() for line in sys.stdin}
    # unshare reaps its host's first process and ends by itself
    kill_all(lambda: in_namespaces(namespaces), but="unshare")


if __name__ == "__main__":
    main()
