"""``python -m distnadam``: the command line."""

from distnadam.cli import main

main()
