"""``d3tom-export completion``"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from . import common

_PROGRAM = "d3tom-export"


@click.command("completion", cls=common.Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options and their values on the tabulator key.

    Write it to where your shell looks for it (for zsh, any folder of $fpath), and start a new one:

    \b
    d3tom-export completion bash > ~/.local/share/bash-completion/completions/d3tom-export
    d3tom-export completion zsh > ~/.zfunc/_d3tom-export
    d3tom-export completion fish > ~/.config/fish/completions/d3tom-export.fish
    """
    found = get_completion_class(shell)
    assert found is not None  # click's own three
    variable = f"_{_PROGRAM.replace('-', '_').upper()}_COMPLETE"  # where click looks for what a key press asks
    click.echo(found(context.find_root().command, {}, _PROGRAM, variable).source(), nl=False)
