"""What Triton Inference Server adds to an answer: its first step, the steps between, its end; and answers a second.

    python -m benchmarks.triton_server BUNDLE [--answers N] [--clients N] [--json FILE]

The server is the one of the tests, 2.51 with its Python backend on the CPU (tests/triton/server.py makes its
environment, in ``.triton-server``). Answers have all their steps (no early exit), each about a picture of its own: none
is remembered. One by one they are asked of the API in this process, of the server with a response a step, and of the
server with the answer alone, in turns; then of servers of one and of two instances by several clients at once.
"""

from __future__ import annotations

import io
import itertools
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

import d3tom_export as d3
from d3tom_export.cost.bench import spread
from d3tom_export.triton.repository import RepositoryRequest, write_repository
from tests.conftest import picture
from tests.triton.client import Client
from tests.triton.server import Environment, Server, environment

QUESTION = "How many digits do you see?"
WAYS = ("the API", "server, a response a step", "server, the answer alone")


def _png(number: int) -> bytes:
    content = io.BytesIO()
    picture(448, 448, number).save(content, "PNG")
    return content.getvalue()


def _of_api(model: d3.Model, image: bytes) -> list[float]:
    started = time.perf_counter()
    steps = model.steps(image, QUESTION, early_exit=False)
    return [time.perf_counter() - started for _ in steps]


def _of_server(client: Client, image: bytes, stream: bool) -> list[float]:
    started = time.perf_counter()
    client.ask(image, QUESTION, early_exit=False, stream=stream)
    return [time.perf_counter() - started for _ in client.replies()]


def one_by_one(bundle: Path, server: Server, answers: int) -> list[dict[str, Any]]:
    """A row for each of :data:`WAYS`: seconds to the first step, between steps and to the end."""
    taken: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with d3.open(bundle, device="cpu") as model, Client(server.grpc) as client:
        for number in range(answers + 1):
            image = _png(number)
            found = (_of_api(model, image), _of_server(client, image, True), _of_server(client, image, False))
            if number:  # the first of each way waits for what is made once
                for way, marks in zip(WAYS, found, strict=True):
                    taken[way].append(marks)
    rows = []
    for way, runs in taken.items():
        row: dict[str, Any] = {"way": way, "responses": len(runs[0]), "end": spread([marks[-1] for marks in runs])}
        if len(runs[0]) > 1:
            between = [after - before for marks in runs for before, after in itertools.pairwise(marks)]
            row |= {"first": spread([marks[0] for marks in runs]), "between": spread(between)}
        rows.append(row)
    return rows


def rate(server: Server, clients: int, answers: int) -> float:
    """Answers a second that ``clients`` get of a server at once."""

    def ask(client: int) -> None:
        with Client(server.grpc) as asking:
            for number in range(answers):
                _of_server(asking, _png(1000 * (client + 1) + number), False)

    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        list(pool.map(ask, range(clients)))
        return clients * answers / (time.perf_counter() - started)


def _serve(bundle: Path, scratch: Path, instances: int) -> tuple[Environment, Path]:
    output = scratch / f"models-{instances}"
    write_repository(RepositoryRequest(bundle, output, {}, instances))
    made = environment(output / "requirements.txt")
    with (output / "answer" / "1" / "site-packages.txt").open("a") as file:
        file.write(f"{made.packages}\n")
    return made, output


def run(bundle: Path, answers: int, clients: int, scratch: Path) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"rates": []}
    for instances in (1, 2):
        made, repository = _serve(bundle, scratch, instances)
        started = time.perf_counter()
        server = Server(made, repository, scratch / f"server-{instances}.txt").ready()
        try:
            found["start"] = time.perf_counter() - started
            if instances == 1:
                found["rows"] = one_by_one(bundle, server, answers)
            for number in (1, clients):
                each = max(1, answers // number)
                rate(server, number, 1)
                found["rates"].append({"instances": instances, "clients": number, "rate": rate(server, number, each)})
        finally:
            server.stop()
    return found


def table(found: dict[str, Any]) -> str:
    """The rows in Markdown; times in milliseconds, medians with the extremes."""

    def shown(figure: dict[str, float] | None) -> str:
        if figure is None:
            return ""
        return f"{1e3 * figure['median']:.1f} ({1e3 * figure['min']:.1f}-{1e3 * figure['max']:.1f})"

    lines = ["| asked of | responses | first step | between two steps | end |", "| --- " * 5 + "|"]
    for row in found["rows"]:
        cells = [row["way"], str(row["responses"]), *(shown(row.get(name)) for name in ("first", "between", "end"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| instances | clients | answers a second |", "| --- " * 3 + "|"]
    lines += [f"| {row['instances']} | {row['clients']} | {row['rate']:.2f} |" for row in found["rates"]]
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--answers", type=click.IntRange(min=1), default=32, show_default=True, help="Of each way.")
@click.option("--clients", type=click.IntRange(min=2), default=4, show_default=True, help="That ask at once.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(bundle: Path, answers: int, clients: int, json_file: Path | None) -> None:
    """Measure and print Markdown tables."""
    with tempfile.TemporaryDirectory() as scratch:
        found = run(bundle, answers, clients, Path(scratch))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found))


if __name__ == "__main__":
    main()
