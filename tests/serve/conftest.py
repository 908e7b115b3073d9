"""Servers that really listen, in a thread of the tests' process, over the synthetic model."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import pytest
from openai import OpenAI

import d3tom_export as d3
from d3tom_export.bundle.folder import Bundle
from d3tom_export.serve.application import make_application
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.server import Server, listen, url_of
from d3tom_export.serve.service import Service
from tests.conftest import picture

OPENING = {"device": "cpu", "kv_cache": False}
MODEL = "tests"
PATIENCE = 120.0
"""Seconds that anything may take on a busy machine."""


def picture_bytes(width: int = 40, height: int = 40, seed: int = 0) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    picture(width, height, seed).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def asking(question: str, *pictures: bytes, **more: Any) -> dict[str, Any]:
    """The body of a request."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_uri(each)}} for each in pictures]
    content = [{"type": "text", "text": question}, *parts]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@dataclass
class Running:
    """A server that listens."""

    url: str
    service: Service
    server: Server
    client: httpx.Client

    def ask(self, body: Any, **more: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body, **more)

    @cached_property
    def openai(self) -> OpenAI:
        """A client of OpenAI's own, which asks once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While this is held, models run no step: the runtime's lock is ours."""
        with self.service._front._lock:
            yield

    @property
    def taken(self) -> int:
        """Places that are."""
        return self.service._taken

    def metric(self, name: str) -> float:
        """The value of a line of /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def serving(bundle: Bundle, *, send_buffer: int | None = None, **how: Any) -> Iterator[Running]:
    """A server of ``bundle``, up to its end, which lets it answer what it accepted.

    ``send_buffer``: bytes that the system takes of a response before anybody reads it; None: as many as it likes.
    """
    failures: list[Exception] = []
    with listen("127.0.0.1", 0) as listening:
        if send_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        application = make_application(
            bundle.folder, **{"opening": OPENING, "name": MODEL, "wait": False, "failed": failures.append, **how}
        )
        server = Server(application, listening)
        thread = threading.Thread(target=server.run_until_stopped)
        thread.start()
        try:
            with httpx.Client(base_url=url_of(listening), timeout=PATIENCE) as client:
                service = application.state.service
                wait_for(lambda: service.ready or bool(failures))
                assert not failures
                wait_for(lambda: server.started)
                yield Running(url_of(listening), service, server, client)
        finally:
            server.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture(scope="package")
def running(bundle: Bundle) -> Iterator[Running]:
    """A server with small limits, for tests that leave it as it was."""
    limits = Limits(queue=64, body_bytes=200_000, pixels=10_000, pictures=2, tokens=64)
    with serving(bundle, limits=limits) as found:
        yield found


@pytest.fixture(scope="package")
def model(bundle: Bundle) -> Iterator[d3.Model]:
    """The same model, asked without a server."""
    with d3.open(bundle.folder, **OPENING) as opened:
        yield opened
