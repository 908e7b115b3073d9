"""``d3tom-export serve``"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from d3tom_export.errors import D3tomError

from . import answer_options, common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.api.answers import Description


def _limit_options(function: options.F) -> options.F:
    """What a request may take, and how many at once."""
    return options.apply_options(
        function,
        [
            heading(Section.SERVING),
            click.option(
                "--queue",
                type=click.IntRange(0, 100_000),
                default=64,
                show_default=True,
                metavar="N",
                help="Requests that wait while others are answered; a further one gets 429 and when to ask again.",
            ),
            click.option(
                "--timeout",
                type=click.FloatRange(1, 86_400),
                default=300.0,
                show_default=True,
                metavar="SECONDS",
                help="From the headers of a request to the end of its answer, waiting included.",
            ),
            click.option(
                "--max-body",
                "body_mib",
                type=click.FloatRange(0, 1024, min_open=True),
                default=32.0,
                show_default=True,
                metavar="MIB",
                help="Size of a request, its pictures in base64 included.",
            ),
            click.option(
                "--max-pictures",
                type=click.IntRange(1, 4096),
                default=16,
                show_default=True,
                metavar="N",
                help="Pictures of a request.",
            ),
            click.option(
                "--max-pixels",
                "megapixels",
                type=click.FloatRange(0, 1024, min_open=True),
                default=50.0,
                show_default=True,
                metavar="MEGAPIXELS",
                help="Size of a picture; those of a request have four times as much together. Decoding takes 8 bytes a "
                "pixel, for two requests at a time.",
            ),
            click.option(
                "--max-tokens",
                type=click.IntRange(min=1),
                metavar="N",
                help="The longest answer: a larger max_tokens is refused, and without one an answer has no more.  "
                "[default: 1024, or --gen-length if that is more]",
            ),
        ],
    )


@click.command(
    "serve", cls=common.Command, first="host port api-key-file jobs queue timeout backend provider kv-cache ratio"
)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@heading(Section.SERVING)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at. Any but a loopback address lets other machines ask: give --api-key-file too, and put "
    "what speaks TLS in front, for keys and pictures pass in the clear.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0 takes one that is free, and says which.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys, one a line, of which a request must have one.  [default: the variable D3TOM_EXPORT_API_KEY; without "
    "either anybody may ask]",
)
@click.option("--model-name", metavar="TEXT", help="What clients call the model.  [default: the checkpoint's name]")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="How often to open the bundle: so many answers are made at once, and share the cores.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    metavar="N",
    help="Answers at once of one open bundle, of waiting requests that are not streamed and whose prompts have equal "
    "layouts. They come together.",
)
@_limit_options
@options.backend_options
@options.verify_option("auto")
@options.loop_option
@options.merge_override_options
@answer_options.generation_options
@answer_options.early_exit_option("on")
@answer_options.wording_options
@common.json_option
def command(
    bundle_folder: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    model_name: str | None,
    jobs: int,
    batch: int,
    queue: int,
    timeout: float,
    body_mib: float,
    max_pictures: int,
    megapixels: float,
    max_tokens: int | None,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    early_exit: bool | None,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Answer over HTTP, as OpenAI's chat API does.

    POST /v1/chat/completions takes messages with text and pictures (data URIs), answers whole or as a stream, and
    /v1/models names the model; /health and /ready are for whoever supervises it, /metrics is for Prometheus. Settings
    given here hold for requests that do not say otherwise.

    It listens on this machine alone unless --host says otherwise. SIGTERM and Ctrl-C let it answer what it accepted
    and end with 0; a second one ends it at once. --json is written when the model is open: the address, the model and
    the limits.

    \b
    d3tom-export serve lavida-tiny-d3tom-l2-r0.9
    d3tom-export serve lavida --host 0.0.0.0 --api-key-file keys.txt --kv-cache --commit threshold
    """
    try:
        from d3tom_export.serve.application import make_application
        from d3tom_export.serve.server import Server, is_loopback, listen, url_of
    except ImportError as error:
        raise D3tomError(
            f"A server stands on Starlette, uvicorn and prometheus-client, and one of them is not installed here "
            f'({error}). Install them with `pip install "d3tom-export[serve]"`.'
        ) from None
    from d3tom_export.process import claim
    from d3tom_export.serve.keys import read_keys
    from d3tom_export.serve.limits import Limits

    if json_file not in (None, "-"):
        common.check_writable(Path(json_file), "--json")
    answer_options.check_system("", system, no_system)
    answer_options.check_stops(stops)
    limits = Limits(queue, timeout, round(body_mib * 2**20), max_pictures, round(megapixels * 1e6), max_tokens, batch)
    opening = options.opening_from(settings)
    keys = read_keys(api_key_file)
    if jobs > 1:
        claim(max(1, (os.cpu_count() or 1) // jobs))
    with listen(host, port) as listening:
        url, alone = url_of(listening), is_loopback(listening)
        if not alone and not keys:
            common.note(f"{url} can be asked by every machine that reaches it: no API key was given.")
        failures: list[Exception] = []

        def failed(error: Exception) -> None:
            failures.append(error)
            server.stop()

        def opened(described: Description) -> None:
            common.ConsoleProgress.close()
            name, service = model_name or described.model, application.state.service
            common.say(json_file, f"{name} answers at {url}/v1 ({described.backend}, {described.precision}).")
            if json_file is not None:
                found = {
                    "url": f"{url}/v1",
                    "model": name,
                    "backend": described.backend,
                    "kv_cache": described.kv_cache,
                }
                common.write_json(json_file, found | {"limits": {**asdict(limits), "tokens": service.most_tokens}})

        application = make_application(
            bundle_folder,
            limits=limits,
            keys=keys,
            name=model_name,
            models=jobs,
            settings=answer_options.settings_from(settings, system, no_system, stops, None, early_exit),
            opening=opening,
            hosts={"localhost", "127.0.0.1", "[::1]", host.lower()} if alone and not keys else (),
            wait=False,
            note=common.note,
            progress=common.ConsoleProgress(),
            opened=opened,
            failed=failed,
        )
        server = Server(application, listening)
        try:
            server.run_until_stopped()
        except D3tomError as error:
            if server.hangs:
                _end_at_once(str(error))
            raise
        if server.hangs:
            _end_at_once(None)
        if failures:
            raise failures[0]


def _end_at_once(error: str | None) -> NoReturn:
    """End the process though a thread of a model goes on, which Python cannot end: runtimes do not survive exits."""
    common.ConsoleProgress.close()
    if error is not None:
        click.echo(f"Error: {error}", err=True)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0 if error is None else 1)
