"""What `serve` answers in a second, and how long each of 1, 8 and 64 clients waits.

    python -m benchmarks.serve_load BUNDLE [--requests N] [--clients N]... [--serve "--kv-cache --jobs 2"] [--json FILE]

The server is the command in a process of its own, the clients are tasks of this one, which ask it over loopback: each
asks its next question when it has the answer to the last. Questions and pictures are the bundle's own samples, in
turns; every other request is streamed. What is not answered is counted. The processor's time is the server's
own, which says more than seconds do on a machine that others use; beside it stands that of the model alone, asked in
this process.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import httpx

import d3tom_export as d3
from d3tom_export.process import claim
from d3tom_export.prompt.samples import SAMPLES_FILE, load_samples

_PATIENCE = 600.0


@dataclass(frozen=True)
class Asked:
    """What became of a request."""

    seconds: float
    first: float | None
    """To the first text of a stream; None for a whole answer."""
    status: int


def bodies(bundle: Path, model: str) -> list[dict[str, Any]]:
    """The bundle's samples as requests, every other one of a stream."""
    found = []
    for number, sample in enumerate(load_samples(bundle / SAMPLES_FILE, 256, fewer=True)):
        parts: list[dict[str, Any]] = [{"type": "text", "text": sample.question}]
        if sample.picture is not None:
            file = io.BytesIO()
            sample.picture.save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": parts}]
        found.append({"model": model, "messages": messages, "stream": bool(number % 2)})
    return found


@contextmanager
def served(bundle: Path, more: Sequence[str], scratch: Path) -> Iterator[dict[str, Any]]:
    """The command, up to its end; what its ``--json`` says."""
    told = scratch / "serve.json"
    told.unlink(missing_ok=True)
    command = [sys.executable, "-m", "d3tom_export", "serve", str(bundle), "--port", "0", "--json", str(told), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not told.exists():
            if process.poll() is not None:
                assert process.stderr is not None
                raise click.ClickException(f"{shlex.join(command)} failed: {process.stderr.read()[-500:]}")
            time.sleep(0.05)
        yield json.loads(told.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Asked:
    started, first = time.perf_counter(), None
    async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if first is None and body["stream"] and '"content":' in line and '"content":""' not in line:
                first = time.perf_counter() - started
    return Asked(time.perf_counter() - started, first, response.status_code)


async def load(url: str, asked: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[Asked]]:
    """Seconds that ``asked`` took so many clients together, and what became of each."""
    waiting, found = iter(asked), []

    async def work(client: httpx.AsyncClient) -> None:
        for body in waiting:
            found.append(await _ask(client, url, body))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=_PATIENCE, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        return time.perf_counter() - started, found


def worked(url: str) -> float:
    """Seconds of the processor that the server took so far."""
    lines = httpx.get(f"{url.removesuffix('/v1')}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_cpu_seconds_total"))


def alone(bundle: Path, kv_cache: bool, count: int) -> float:
    """Seconds of the processor for an answer of the model in this process, without a server."""
    claim()
    samples = load_samples(bundle / SAMPLES_FILE, 256, fewer=True)
    with d3.open(bundle, kv_cache=kv_cache) as model:
        for sample in islice(cycle(samples), 16):
            model.answer(sample.picture, sample.question)
        started = time.process_time()
        for sample in islice(cycle(samples), count):
            model.answer(sample.picture, sample.question)
        return (time.process_time() - started) / count


def row(clients: int, seconds: float, found: Sequence[Asked], work: float) -> dict[str, Any]:
    """One line of the table; ``work`` is the processor's time for all of it."""
    good = [asked for asked in found if asked.status == 200]
    times = sorted(asked.seconds for asked in good)
    firsts = [asked.first for asked in good if asked.first is not None]
    return {
        "clients": clients,
        "requests": len(found),
        "not_answered": len(found) - len(good),
        "requests_per_second": len(good) / seconds,
        "median": statistics.median(times),
        "p95": times[min(len(times) - 1, int(0.95 * len(times)))],
        "first_text": statistics.median(firsts) if firsts else None,
        "work": work / len(found),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| clients | requests | not answered | requests/s | latency, median (s) | 95 % below (s) | first text (s) "
        "| processor a request (s) |",
        "| --- " * 8 + "|",
    ]
    for each in rows:
        first = "" if each["first_text"] is None else f"{each['first_text']:.2f}"
        lines.append(
            f"| {each['clients']} | {each['requests']} | {each['not_answered']} | {each['requests_per_second']:.1f} "
            f"| {each['median']:.2f} | {each['p95']:.2f} | {first} | {each['work']:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--requests", type=click.IntRange(min=1), default=256, show_default=True, help="For each row.")
@click.option("--clients", type=click.IntRange(min=1), multiple=True, default=(1, 8, 64), show_default=True)
@click.option("--serve", "more", default="", help="Further options of the command.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(bundle: Path, requests: int, clients: Sequence[int], more: str, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch, served(bundle, shlex.split(more), Path(scratch)) as told:
        asked = list(islice(cycle(bodies(bundle, told["model"])), requests))
        asyncio.run(load(told["url"], asked[:16], 1))  # kernels are chosen, memory is had
        rows = []
        for count in clients:
            click.echo(f"{count} clients", err=True)
            before = worked(told["url"])
            seconds, found = asyncio.run(load(told["url"], asked, count))
            rows.append(row(count, seconds, found, worked(told["url"]) - before))
    by_itself = alone(bundle, told["kv_cache"], min(requests, 64))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"serve": more, "told": told, "rows": rows, "alone": by_itself}, indent=2) + "\n",
            encoding="utf-8",
        )
    click.echo(f"{table(rows)}\n\nThe model alone: {by_itself:.3f} s of the processor an answer.")


if __name__ == "__main__":
    main()
