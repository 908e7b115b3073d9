"""Responses that are taken within their time, or whose connection is cut: who reads nothing holds nothing for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import anyio
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

TRANSPORT = "d3tom_transport"
"""In a connection's state its transport of asyncio's, where the server has it there."""
_LOOK = 0.05
"""Seconds between two looks at what of a response is unsent."""


class Timed:
    """A response, as an ASGI application.

    Args:
        response: What is sent.
        until: When it has to be taken, on the clock of :func:`time.monotonic`; then its connection is cut.
        over: Called once, when it was sent or cut.
    """

    def __init__(self, response: ASGIApp, until: float, over: Callable[[], None]) -> None:
        self._response, self._until, self._over = response, until, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = scope.get("state", {}).get(TRANSPORT)
        try:
            with anyio.move_on_after(self._until - time.monotonic()) as limit:
                await self._response(scope, receive, send)
                while transport is not None and transport.get_write_buffer_size():
                    await asyncio.sleep(_LOOK)  # its end is not sent before it is taken
            if limit.cancelled_caught and transport is not None:
                transport.abort()  # closing it would wait for whoever does not read
                await asyncio.sleep(0)  # the server hears of it before it would complain of half a response
        finally:
            self._over()


class Stream(Response):
    """Server-sent events, whose source notices by itself that the client left; it is closed in any case."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
