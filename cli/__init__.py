"""The command line. Command modules import click and light configuration only; heavy imports wait for a command."""
