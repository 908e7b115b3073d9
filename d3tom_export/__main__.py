"""``python -m d3tom_export``: the command line."""

from d3tom_export.cli.main import main

main(prog_name="d3tom-export")
