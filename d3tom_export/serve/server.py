"""uvicorn around the application, on a socket of ours, stopped so that what was accepted is answered."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from d3tom_export.errors import D3tomError
from d3tom_export.serve.limits import SENDING
from d3tom_export.serve.responses import TRANSPORT
from d3tom_export.serve.service import Service

_SAME_STOP = 1.0
"""Seconds within which further signals are taken for the first one's."""
_SPARE = math.ceil(SENDING) + 1
"""Seconds beyond a request's own, in which its response is sent or cut."""
_STEP = 2.0
"""Seconds that a model's step at hand has where a server ends at once."""


def listen(host: str, port: int) -> socket.socket:
    """A socket of that address; port 0 is one that is free. Raises :class:`D3tomError` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise D3tomError(
            f"Nothing can listen at {host}, port {port}: {reason}. Give --host an address of this machine, and --port "
            "one that is free; 0 takes any."
        ) from None
    return found


def is_loopback(listening: socket.socket) -> bool:
    """Whether only programs of this machine reach it."""
    host = str(listening.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def url_of(listening: socket.socket) -> str:
    """Where it is reached."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """uvicorn's, whose requests know their connection: so that it can be cut."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, TRANSPORT: transport}


class Server(uvicorn.Server):
    """Serves an application until it is told to stop: by SIGTERM, SIGINT, SIGHUP or :meth:`stop`.

    Then no connection is accepted any more, requests on those there are get 503, and what was accepted is answered. A
    second signal ends it at once: a step at hand has two seconds, and :attr:`hangs` tells of what goes on.

    Args:
        application: What :func:`~d3tom_export.serve.application.make_application` made.
        listening: From :func:`listen`.
    """

    def __init__(self, application: Starlette, listening: socket.socket) -> None:
        self._service: Service = application.state.service
        self._listening, self._told, self._lost = listening, 0.0, 0
        self.hangs = False
        """Whether a model's thread goes on that was not waited for: it loads, or is at a batch or a long step."""
        super().__init__(
            uvicorn.Config(
                application,
                http=_Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(self._service.limits.seconds) + _SPARE,
            )
        )

    def run_until_stopped(self) -> None:
        """Raises :class:`D3tomError` where requests were accepted that have no answer."""
        asyncio.run(self.serve(sockets=[self._listening]))
        if self.force_exit:
            self.hangs = not self._service.answering.stop(_STEP)  # all is given up: the step at hand ends
            if self._lost:
                raise D3tomError(
                    f"The server was ended at once, before {self._lost} requests that it had accepted were answered. "
                    "One signal alone lets it answer them."
                )

    def stop(self) -> None:
        """From any thread, or a signal's handler."""
        self._service.stopping = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own would have the signal raised again at the end: but a server that was told to stop is done."""
        if not self._told:
            self._told = time.monotonic()
        elif time.monotonic() - self._told > _SAME_STOP:
            self._lost = self._lost or self._service.answering.waiting + self._service.answering.running
            self.force_exit = self._service.abandoned = True
            logging.getLogger("uvicorn.error").disabled = True  # it would trace every request that is given up
        self.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            hang_up = getattr(signal, "SIGHUP", None)
            elsewhere = threading.current_thread() is not threading.main_thread()
            if elsewhere or hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(hang_up, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hang_up, before)
