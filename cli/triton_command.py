"""``d3tom-export triton``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.triton.repository import Repository


@click.command(
    "triton",
    cls=common.Command,
    first="output force instances backend provider precision kv-cache site-packages link stages",
)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@heading(Section.OUTPUT)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="REPO",
    help="Folder to write, a model repository.",
)
@click.option("--force", is_flag=True, help="Replace REPO if it is a model repository that this command wrote.")
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that answer, each with the bundle open: on GPUs so many on each, else in all, sharing the cores.",
)
@click.option(
    "--site-packages",
    multiple=True,
    metavar="DIR",
    help="Folder on the server's machine in which the model looks for packages; give it again for several. [default: "
    "those of the server's own Python]",
)
@click.option("--link", is_flag=True, help="Take hard links to the bundle's files, not copies.")
@click.option(
    "--stages",
    is_flag=True,
    help="Write the loop's graphs as models of their own as well, for the server's ONNX Runtime backend.",
)
@options.backend_options
@options.verify_option("auto")
@options.loop_option
@common.json_option
def command(
    bundle_folder: Path,
    output: Path,
    force: bool,
    instances: int,
    site_packages: tuple[str, ...],
    link: bool,
    stages: bool,
    json_file: str | None,
    **opening: Any,
) -> None:
    """Write a model repository that Triton Inference Server answers questions with.

    REPO has the model `answer`, which the server's Python backend runs: a picture and a question in, a response for
    each step out, then the answer. The bundle and what opens it are in it, requirements.txt names what its server needs
    beside, README.md how it is started and asked. Instances are GPUs' where --backend or --provider are, else the
    CPU's: auto is the CPU here.

    \b
    d3tom-export triton lavida-tiny-d3tom-l2-r0.9 --output models
    d3tom-export triton lavida --output models --provider cuda --precision bf16 --kv-cache
    d3tom-export triton lavida --output models --backend tensorrt --link
    """
    from d3tom_export.triton.repository import RepositoryRequest, write_repository

    request = RepositoryRequest(
        bundle_folder, output, opening, instances, site_packages, link=link, stages=stages, force=force
    )
    written = write_repository(request, common.ConsoleProgress(), common.note)
    result = {
        "repository": str(written.folder),
        "models": list(written.models),
        "gpu": written.gpu,
        "requirements": list(written.requirements),
        "bytes": written.bytes,
        "linked_bytes": written.linked_bytes,
        "seconds": round(written.seconds, 3),
    }
    common.write_json(json_file, result)
    common.say(json_file, _summary(written))


def _summary(written: Repository) -> str:
    links = f", {written.linked_bytes / 1e6:.1f} MB of them linked" if written.linked_bytes else ""
    size = f"{written.bytes / 1e6:.1f} MB{links}, in {written.seconds:.1f} s"
    return (
        f"{written.folder}: {', '.join(written.models)}; {size}. {written.folder / 'README.md'} says how a server is "
        "started on it."
    )
