"""Entry point and command group: commands load when they are named, so that ``--help`` is instant."""

from __future__ import annotations

import importlib
import sys

import click
from click.shell_completion import CompletionItem

from d3tom_export.process import claim
from d3tom_export.version import __version__

from . import common, streams

SECTIONS = {
    "Make a bundle": {
        "build": "Export a checkpoint to a bundle of ONNX stages.",
        "tune": "Search for the setting to build with, and check it on other questions.",
    },
    "Ask it": {
        "run": "Answer a question about a picture with a bundle.",
        "batch": "Answer many questions from a file, or one about many pictures.",
    },
    "Serve it": {
        "serve": "Answer over HTTP, as OpenAI's chat API does.",
        "triton": "Write a model repository for Triton Inference Server.",
    },
    "Prove it": {
        "validate": "Prove a bundle or a recorded run against PyTorch, step by step.",
        "report": "Show what a bundle does with a few pictures, as one HTML page.",
    },
    "Study it": {
        "evaluate": "Ask questions with known answers in many settings, and compare.",
        "bench": "Time answers with and without KV cache, with and without merging.",
        "flops": "Count FLOPs and bytes of an answer by stage, and what merging saves.",
    },
    "Look around": {
        "inspect": "Show what a bundle holds.",
        "doctor": "Say which backends work here, and what the others need.",
        "completion": "Print what makes your shell complete commands and options.",
    },
}
"""Commands and their one-line help, by what they are for; each lives in the module of its name."""

COMMANDS = {name: line for commands in SECTIONS.values() for name, line in commands.items()}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # `inspect` and others would shadow or be shadowed by well-known modules: their files carry a suffix.
        module = importlib.import_module(f"{__package__}.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", line) for name, line in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by :data:`COMMANDS` alone: a key press imports none of them."""
        names = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="d3tom-export")
def main() -> None:
    """Make diffusion multimodal LLMs cheap to run: D3ToM token merging as ONNX stages, checked against PyTorch.

    \b
    d3tom-export build --layer 2 --ratio 0.9
    d3tom-export run lavida-tiny-d3tom-l2-r0.9 --image picture.png --prompt "What do you see?"

    Exit codes: 0 done and passed, 1 failed or did not pass, 2 called wrongly.
    """


def entry() -> None:
    """The installed program: :func:`main` in a process of its own."""
    claim()
    streams.open_missing()
    code: object = 0
    try:
        main(prog_name="d3tom-export")
    except SystemExit as stop:
        code = stop.code
    except OSError as error:  # commands have their own words for theirs: this is of --help and the like
        click.echo(f"Error: {common.system_paragraph('d3tom-export', error)}", err=True)
        code = 1
    if not streams.settle():
        code = code or 1
    sys.exit(code)  # type: ignore[arg-type]
