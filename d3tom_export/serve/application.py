"""The application: what is asked over HTTP, whoever serves it. It follows ASGI, so uvicorn and Ray Serve both do."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from d3tom_export.api.answers import Answer, Description, Step
from d3tom_export.errors import D3tomError
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.serve.answering import Event, Work
from d3tom_export.serve.failures import RequestError, defect, of_library, too_late, unavailable
from d3tom_export.serve.keys import Keys
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.metrics import CONTENT_TYPE
from d3tom_export.serve.replies import END_OF_STREAM, Reply, event
from d3tom_export.serve.service import Prepared, Service

_LOG = logging.getLogger(__name__)
_LEFT = 499
"""Status of a request whose client left, for the metrics: nobody else sees it."""
_READERS = 2
"""Requests that are read, and whose pictures are decoded, at once."""


def _raise(error: Exception) -> None:
    _LOG.error("the bundle cannot be opened: %s", error)


def make_application(
    bundle: str | os.PathLike[str],
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    name: str | None = None,
    models: int = 1,
    settings: Mapping[str, Any] | None = None,
    opening: Mapping[str, Any] | None = None,
    hosts: Collection[str] = (),
    wait: bool = True,
    note: Note = no_note,
    progress: Progress = no_progress,
    opened: Callable[[Description], None] = lambda _: None,
    failed: Callable[[Exception], None] = _raise,
) -> Starlette:
    """An ASGI application that answers with ``bundle``; its ``state.service`` is the :class:`Service`.

    Its models are opened when it starts (ASGI's lifespan), and closed when it ends, once what was accepted is answered.

    Args:
        bundle: The folder that ``build`` wrote.
        limits: Of requests.
        keys: API keys, of which /v1 wants one; none: all are let in. Each has 16 or more printable ASCII characters.
        name: What clients call the model; None: the checkpoint's name.
        models: How often the bundle is opened: answers that are made at once.
        settings: Of answers whose requests do not say otherwise, by the names of :class:`d3tom_export.Settings`.
        opening: How the bundle is opened: arguments of :func:`d3tom_export.open`.
        hosts: What a request may call this server; none: anything. For a server without keys on a loopback address,
            which a page in the user's browser may lead a name of its own to.
        wait: Whether the application has started only when its models are open; else /ready tells, and requests that
            come before get 503.
        note: Called with sentences for the user while models are opened.
        progress: Called while the first model's stages load.
        opened: Called, in a thread, when the first model is open.
        failed: Called, in a thread, with the error of a model that cannot be opened after all.

    Raises :class:`~d3tom_export.errors.D3tomError` where ``bundle`` is none, and for settings and keys that cannot be.
    """
    let_in = Keys(keys)
    service = Service(
        Path(bundle),
        limits=limits or Limits(),
        name=name,
        models=models,
        settings=settings or {},
        opening=opening or {},
        note=note,
        progress=progress,
        opened=opened,
        failed=failed,
    )
    web = _Web(service, let_in, frozenset(hosts))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.answering.start()
        try:
            if wait:
                await run_sync(service.answering.wait)
            yield
        finally:
            service.stopping = True
            await run_sync(service.answering.stop)

    routes = [
        Route("/v1/chat/completions", web.chat, methods=["POST"]),
        Route("/v1/models", web.models),
        Route("/v1/models/{model:path}", web.model),
        Route("/metrics", web.metrics),
        Route("/health", web.health),
        Route("/ready", web.ready),
    ]
    handlers: dict[Any, Any] = {RequestError: web.refused, HTTPException: web.not_found, Exception: web.broken}
    application = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    application.state.service = service
    return application


class _Web:
    """The endpoints of a service."""

    def __init__(self, service: Service, keys: Keys, hosts: frozenset[str]) -> None:
        self._service, self._keys, self._hosts = service, keys, hosts
        self._readers: anyio.CapacityLimiter | None = None

    async def health(self, request: Request) -> Response:
        """Whether the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether requests are taken."""
        status = "ready" if self._service.ready else "stopping" if self._service.stopping else "loading"
        return JSONResponse({"status": status}, 200 if self._service.ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        self._let_in(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._let_in(request)
        found = self._model()
        if request.path_params["model"] != found["id"]:
            raise RequestError(
                404, f"There is no such model here; this server has {found['id']!r}.", code="model_not_found"
            )
        return JSONResponse(found)

    def _model(self) -> dict[str, Any]:
        self._check_ready()
        return {"id": self._service.model, "object": "model", "created": self._service.created, "owned_by": "d3tom"}

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse(error.to_json(), error.status, error.headers)

    async def not_found(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        says = f"{request.method} {request.url.path}: {error.detail}. POST /v1/chat/completions is what answers."
        return JSONResponse(RequestError(error.status_code, says).to_json(), error.status_code, error.headers)

    async def broken(self, request: Request, error: Exception) -> Response:
        return await self.refused(request, defect(error))

    def _let_in(self, request: Request) -> None:
        if self._hosts and _host_of(request) not in self._hosts:
            raise RequestError(
                403, "This server answers to its own address only, which the Host header does not name.", code="host"
            )
        if not self._keys.let_in(request.headers.get("authorization", "")):
            raise RequestError(
                401,
                "The request has no API key of this server. Send one as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_ready(self) -> None:
        if not self._service.ready:
            why = "is stopping" if self._service.stopping else "is loading its model"
            raise unavailable(f"The server {why}. Ask again later.")

    async def chat(self, request: Request) -> Response:
        """Answer a chat request, whole or as a stream."""
        started = time.monotonic()
        try:
            return await self._chat(request, started)
        except RequestError as refusal:
            self._over(refusal.status, started)
            raise
        except ClientDisconnect:
            self._over(_LEFT, started)
            return Response(status_code=_LEFT)
        except Exception:
            self._over(500, started)
            raise

    async def _chat(self, request: Request, started: float) -> Response:
        service, limits = self._service, self._service.limits
        self._let_in(request)
        self._check_ready()
        _check_headers(request, limits.body_bytes)
        until = started + limits.seconds
        free = service.take_place()
        try:
            prepared = await self._prepared(request, until)
            loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

            def later(function: Callable[..., Any], *arguments: Any) -> None:
                with suppress(RuntimeError):  # the loop is closed: the server was told to end at once
                    loop.call_soon_threadsafe(function, *arguments)

            chat = prepared.chat
            work = Work(
                prepared.pictures,
                chat.question,
                prepared.settings,
                chat.stream,
                partial(later, events.put_nowait),
                partial(later, free),
            )
        except BaseException:
            free()
            raise
        service.answering.submit(work)
        reply = Reply(
            service.model, service.fingerprint, chat.stops, prepared.settings["seed"], include_usage=chat.include_usage
        )
        found = self._events(request, work, events, until)
        if not chat.stream:
            async with aclosing(found):
                answer = await anext(found)
            assert isinstance(answer, Answer)
            self._over(200, started, answer)
            return JSONResponse(reply.whole(answer))
        try:
            first = await anext(found)  # what is refused until now has a status of its own
        except BaseException:
            await found.aclose()
            raise
        return _Stream(self._chunks(first, found, reply, prepared, started))

    async def _prepared(self, request: Request, until: float) -> Prepared:
        """The request, read within its time. Raises :class:`RequestError`."""
        self._readers = self._readers or anyio.CapacityLimiter(_READERS)
        limits = self._service.limits
        try:
            with anyio.fail_after(until - time.monotonic()):
                body = await _body(request, limits.body_bytes)
                return await run_sync(self._service.prepare, body, limiter=self._readers)
        except TimeoutError:
            raise RequestError(
                408, f"The request was not read within {limits.seconds:g} s.", code="timeout", headers=_CLOSE
            ) from None

    async def _events(
        self, request: Request, work: Work, events: asyncio.Queue[Event], until: float
    ) -> AsyncGenerator[Step | Answer, None]:
        """What becomes of ``work``, up to its answer; it is given up with the iterator.

        Raises :class:`RequestError`, and :class:`ClientDisconnect` where the client left.
        """
        left = asyncio.ensure_future(_disconnected(request))
        try:
            while True:
                coming = asyncio.ensure_future(events.get())
                try:
                    await asyncio.wait({coming, left}, timeout=until - time.monotonic(), return_when="FIRST_COMPLETED")
                    if left.done():
                        raise ClientDisconnect
                    if not coming.done():
                        raise too_late(self._service.limits.seconds)
                    found = coming.result()
                finally:
                    coming.cancel()
                if isinstance(found, D3tomError):
                    raise of_library(found)
                if isinstance(found, Exception):
                    raise defect(found)
                yield found
                if isinstance(found, Answer):
                    return
        finally:
            left.cancel()
            self._service.answering.give_up(work)

    async def _chunks(
        self,
        first: Step | Answer,
        events: AsyncGenerator[Step | Answer, None],
        reply: Reply,
        asked: Prepared,
        started: float,
    ) -> AsyncGenerator[bytes, None]:
        """A stream's events."""
        code, answer, said, found = _LEFT, None, "", first
        try:
            yield event(reply.first_chunk())
            while isinstance(found, Step):
                text = asked.chat.stops.said(found.final)
                more, said = text[len(said) :], max(said, text, key=len)
                figures = {"d3tom": _draft(found)} if asked.chat.drafts else {}
                if more or figures:
                    yield event(reply.chunk(more or None, **figures))
                found = await anext(events)
            answer, whole = found, reply.text(found)
            if not whole.startswith(said):
                raise defect(RuntimeError("the answer does not begin as its stream did"))
            if whole != said:
                yield event(reply.chunk(whole[len(said) :]))
            for chunk in reply.last_chunks(answer):
                yield event(chunk)
            code = 200
            yield END_OF_STREAM
        except RequestError as refusal:
            code = refusal.status
            yield event(refusal.to_json())
        except ClientDisconnect:
            return
        finally:
            await events.aclose()
            self._over(code, started, answer)

    def _over(self, code: int, started: float, answer: Answer | None = None) -> None:
        metrics = self._service.metrics
        metrics.requests.labels(str(code)).inc()
        metrics.seconds.observe(time.monotonic() - started)
        if answer is not None:
            metrics.answered(answer)


_CLOSE = {"Connection": "close"}


class _Stream(Response):
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


def _draft(step: Step) -> dict[str, Any]:
    """A step as a stream with drafts tells it."""
    return {"step": step.number, "of": step.total, "kept": step.kept, "draft": step.text}


def _host_of(request: Request) -> str:
    """What the request calls this server, without the port."""
    host = request.headers.get("host", "")
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0].lower()


def _check_headers(request: Request, most: int) -> None:
    """Refuse what the headers tell already. Raises :class:`RequestError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page cannot send that elsewhere unasked
        raise RequestError(415, "The body is JSON: send it with `Content-Type: application/json`.", code="content_type")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> RequestError:
    return RequestError(
        413,
        f"The body has more than the {most:,} bytes that this server reads. Send smaller pictures; no model sees more "
        "than a few megapixels of them.",
        code="body_too_large",
    )


async def _body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


async def _disconnected(request: Request) -> None:
    """Returns once the client has left; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
