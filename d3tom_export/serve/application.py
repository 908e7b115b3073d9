"""The application: what is asked over HTTP, whoever serves it. It follows ASGI, so uvicorn and Ray Serve both do."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
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
from starlette.types import ASGIApp

from d3tom_export.api.answers import Answer, Description, Step
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.serve.answering import Event, Work
from d3tom_export.serve.failures import RequestError, defect, of_model, too_late, unavailable
from d3tom_export.serve.keys import Keys
from d3tom_export.serve.limits import SENDING, Limits
from d3tom_export.serve.metrics import CONTENT_TYPE
from d3tom_export.serve.replies import END_OF_STREAM, Reply, event
from d3tom_export.serve.requests import Chat
from d3tom_export.serve.responses import Stream, Timed
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
            service.answering.end()
            while service.answering.lives and not service.abandoned:
                await asyncio.sleep(0.02)

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


class _AbandonedError(Exception):
    """Nobody waits for a request that is being prepared."""


@dataclass(frozen=True)
class _Said:
    """What a stream says of a step: made in the model's thread, for the loop's has other clients."""

    text: str
    """The answer as far as it stays."""
    figures: dict[str, Any]
    """Of the step, where drafts are wanted."""

    @classmethod
    def of(cls, step: Step, asked: Chat) -> _Said:
        draft = {"step": step.number, "of": step.total, "kept": step.kept, "draft": step.text} if asked.drafts else None
        return cls(asked.stops.said(step.final), {} if draft is None else {"d3tom": draft})


_Event = _Said | Answer | Exception


class _Web:
    """The endpoints of a service."""

    def __init__(self, service: Service, keys: Keys, hosts: frozenset[str]) -> None:
        self._service, self._keys, self._hosts = service, keys, hosts
        self._readers: anyio.CapacityLimiter | None = None

    async def health(self, request: Request) -> Response:
        """Whether the process lives."""
        self._check_host(request)
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether requests are taken."""
        self._check_host(request)
        status = "ready" if self._service.ready else "stopping" if self._service.stopping else "loading"
        return JSONResponse({"status": status}, 200 if self._service.ready else 503)

    async def metrics(self, request: Request) -> Response:
        self._check_host(request)
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

    def _check_host(self, request: Request) -> None:
        if self._hosts and _host_of(request) not in self._hosts:
            raise RequestError(
                403, "This server answers to its own address only, which the Host header does not name.", code="host"
            )

    def _let_in(self, request: Request) -> None:
        self._check_host(request)
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

    async def chat(self, request: Request) -> ASGIApp:
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

    async def _chat(self, request: Request, started: float) -> ASGIApp:
        service, limits = self._service, self._service.limits
        self._let_in(request)
        self._check_ready()
        _check_headers(request, limits.body_bytes)
        until = started + limits.seconds
        free, holders = service.take_place(), 2  # the work, and its response

        def let_go() -> None:
            nonlocal holders
            holders -= 1
            if not holders:
                free()

        try:
            prepared = await self._prepared(request, until)
        except BaseException:
            free()
            raise
        chat, seed = prepared.chat, prepared.settings["seed"]
        loop, events = asyncio.get_running_loop(), asyncio.Queue[_Event]()

        def later(function: Callable[..., Any], *arguments: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server was told to end at once
                loop.call_soon_threadsafe(function, *arguments)

        def tell(found: Event) -> None:
            later(events.put_nowait, _Said.of(found, chat) if isinstance(found, Step) else found)

        pictures, settings = prepared.pictures, prepared.settings
        work = Work(pictures, chat.question, settings, chat.stream, tell, partial(later, let_go))
        del prepared, pictures  # the model's thread has them, as long as it needs them
        service.answering.submit(work)
        try:
            response = await self._response(request, chat, seed, self._events(request, work, events, until), started)
        except BaseException:
            let_go()
            raise
        return Timed(response, until + SENDING, let_go)

    async def _response(
        self, request: Request, chat: Chat, seed: int, events: AsyncGenerator[_Said | Answer, None], started: float
    ) -> Response:
        """What ``events`` say to the client, once there is something to say."""
        service = self._service
        reply = Reply(service.model, service.fingerprint, chat.stops, seed, include_usage=chat.include_usage)
        if not chat.stream:
            async with aclosing(events):
                answer = await anext(events)
            assert isinstance(answer, Answer)
            self._over(200, started, answer)
            return JSONResponse(reply.whole(answer))
        try:
            first = await anext(events)  # what is refused until now has a status of its own
        except BaseException:
            await events.aclose()
            raise
        return Stream(self._chunks(first, events, reply, started))

    async def _prepared(self, request: Request, until: float) -> Prepared:
        """The request, read within its time. Raises :class:`RequestError`, :class:`ClientDisconnect`."""
        self._readers = self._readers or anyio.CapacityLimiter(_READERS)
        limits, gone = self._service.limits, False
        try:
            with anyio.fail_after(until - time.monotonic()):
                body = await _body(request, limits.body_bytes)
        except TimeoutError:
            raise RequestError(
                408, f"The request was not read within {limits.seconds:g} s.", code="timeout", headers=_CLOSE
            ) from None

        def between() -> None:
            if gone or time.monotonic() > until:
                raise _AbandonedError

        with anyio.move_on_after(until - time.monotonic()) as limit:  # a thread that decodes is waited for

            async def watch() -> None:
                nonlocal gone
                await _disconnected(request)
                gone = True
                limit.cancel()

            left = asyncio.ensure_future(watch())
            try:
                return await run_sync(partial(self._service.prepare, body, between), limiter=self._readers)
            except _AbandonedError:
                pass
            except asyncio.CancelledError:
                gone = gone or not limit.cancel_called  # the server ends: no further picture is decoded
                raise
            finally:
                left.cancel()
        if gone:
            raise ClientDisconnect
        raise too_late(limits.seconds)

    async def _events(
        self, request: Request, work: Work, events: asyncio.Queue[_Event], until: float
    ) -> AsyncGenerator[_Said | Answer, None]:
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
                if isinstance(found, Exception):
                    raise of_model(found)
                yield found
                if isinstance(found, Answer):
                    return
        finally:
            left.cancel()
            self._service.answering.give_up(work)

    async def _chunks(
        self, first: _Said | Answer, events: AsyncGenerator[_Said | Answer, None], reply: Reply, started: float
    ) -> AsyncGenerator[bytes, None]:
        """A stream's events."""
        code, answer, said, found = 500, None, "", first
        try:
            yield event(reply.first_chunk())
            while isinstance(found, _Said):
                more, said = found.text[len(said) :], max(said, found.text, key=len)
                if more or found.figures:
                    yield event(reply.chunk(more or None, **found.figures))
                found = await anext(events)
            answer, whole = found, reply.text(found)
            if not whole.startswith(said):
                raise RuntimeError("the answer does not begin as its stream did")
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
            code = _LEFT
        except (GeneratorExit, asyncio.CancelledError):  # nobody takes what is sent
            code = _LEFT if code != 200 else code
            raise
        except Exception as error:
            _LOG.exception("a stream stopped on an unexpected error")
            yield event(defect(error).to_json())
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
