"""``python -m wsfast`` is the command ``wsfast``."""

from wsfast.cli import main

main(prog_name="wsfast")
