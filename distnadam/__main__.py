"""``python -m distnadam``, and the command `distnadam`: the command line."""

import sys


def main() -> None:
    """Run the command line; a Ctrl-C while it is imported ends it as any later one does."""
    try:
        from distnadam.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
