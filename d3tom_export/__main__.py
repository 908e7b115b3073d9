"""``python -m d3tom_export``: the command line."""

from d3tom_export.cli.main import entry

entry()
