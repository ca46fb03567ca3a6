"""`python -m dynmerge.cli`: the command, where the console script is not on the path."""

from dynmerge.cli import main

main()
