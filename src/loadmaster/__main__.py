"""`python -m loadmaster`."""

from loadmaster.cli import command

command()
