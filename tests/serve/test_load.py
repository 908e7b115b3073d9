"""More requests than are taken, clients that leave, requests that take too long, and servers that are stopped."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import d3tom_export as d3
from d3tom_export.api import pictures
from d3tom_export.bundle.folder import Bundle
from d3tom_export.errors import D3tomError, SizeError
from d3tom_export.serve import application
from d3tom_export.serve.answering import Work
from d3tom_export.serve.application import make_application
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.server import Server, listen, url_of
from tests.serve.conftest import MODEL, OPENING, PATIENCE, asking, picture_bytes, serving, wait_for


def _sent(url: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent; nobody waits for its response."""
    content = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_full_queue_says_when_to_come_again(bundle: Bundle, model: d3.Model) -> None:
    with serving(bundle, limits=Limits(queue=3)) as running, ThreadPoolExecutor(4) as pool:
        with running.at_rest():
            taken: list[Future[httpx.Response]] = [
                pool.submit(running.ask, asking(f"What is {n}?", max_tokens=4)) for n in range(4)
            ]
            wait_for(lambda: running.service.answering.waiting == 3)
            assert running.metric("d3tom_waiting_requests") == 3
            assert running.metric("d3tom_running_requests") == 1
            for _ in range(3):
                refused = running.ask(asking("What?"))
                assert refused.status_code == 429
                assert refused.json()["error"]["type"] == "rate_limit_error"
                assert 1 <= int(refused.headers["retry-after"]) <= 60
        for n, future in enumerate(taken):
            found = future.result(PATIENCE).json()["choices"][0]["message"]["content"]
            assert found == model.answer(None, f"What is {n}?", gen_length=4).text
        assert running.metric('d3tom_requests_total{code="429"}') == 3
        assert running.ask(asking("What?", max_tokens=2)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(bundle: Bundle, stream: bool) -> None:
    with serving(bundle, limits=Limits(queue=1)) as running:
        with running.at_rest():
            first = _sent(running.url, asking("What?", max_tokens=8, stream=stream))
            wait_for(lambda: running.service.answering.running == 1)
            second = _sent(running.url, asking("What?", max_tokens=8, stream=stream))
            wait_for(lambda: running.service.answering.waiting == 1)
            assert running.ask(asking("?")).status_code == 429
            second.close()
            wait_for(lambda: running.taken == 1)  # it waited: it is gone at once
            assert running.service.answering.waiting == 0
            first.close()
            wait_for(lambda: running.metric('d3tom_requests_total{code="499"}') == 2)
        wait_for(lambda: running.taken == 0)  # it was begun: it ends with its step
        assert running.metric("d3tom_steps_total") == 0
        assert running.ask(asking("What?", max_tokens=2)).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_a_stream(bundle: Bundle) -> None:
    with serving(bundle) as running:
        body = asking("What?", max_tokens=64, stream=True, d3tom={"drafts": True})
        with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
            chunks = response.iter_raw()
            while b"draft" not in next(chunks):
                pass
        wait_for(lambda: running.taken == 0)
        assert running.metric('d3tom_requests_total{code="499"}') == 1
        assert running.metric("d3tom_steps_total") == 0


def test_a_request_has_its_time_and_no_more(bundle: Bundle) -> None:
    with serving(bundle, limits=Limits(seconds=1.0)) as running:
        with running.at_rest():
            late = running.ask(asking("What?", max_tokens=4))
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            # One whose body does not come.
            host, port = running.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as slow:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
                assert b" 408 " in slow.recv(1000)
        wait_for(lambda: running.taken == 0)
        assert running.ask(asking("What?", max_tokens=2)).status_code == 200


def test_a_stream_that_is_late_says_so(bundle: Bundle) -> None:
    with serving(bundle, limits=Limits(seconds=2.0)) as running:
        body = asking("What?", max_tokens=64, stream=True, d3tom={"drafts": True})
        with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            chunks = response.iter_raw()
            received = b""
            while b"draft" not in received:
                received += next(chunks)
            with running.at_rest():
                received += b"".join(chunks)
        assert json.loads(received.strip().splitlines()[-1].removeprefix(b"data: "))["error"]["code"] == "timeout"


def test_what_breaks_is_no_client_s_business(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """Memory that runs out while an answer is made, for one: the server says so much, and goes on."""
    with serving(bundle) as running:
        backend = running.service._front._backend
        assert backend is not None
        start, backend.start = backend.start, None  # type: ignore[method-assign,assignment]
        try:
            broken = running.ask(asking("What?", max_tokens=4))
        finally:
            backend.start = start  # type: ignore[method-assign]
        assert broken.status_code == 500
        assert broken.json()["error"]["code"] == "defect"
        assert "TypeError" in broken.json()["error"]["message"]
        assert "Traceback" in caplog.text
        wait_for(lambda: running.taken == 0)
        assert running.ask(asking("What?", max_tokens=2)).status_code == 200


def test_a_batch_that_breaks_is_no_client_s_business(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """As one answer that does: 500, and the exception itself is logged."""
    with serving(bundle, limits=Limits(batch=4)) as running, ThreadPoolExecutor(3) as pool:
        backend = running.service._front._backend
        assert backend is not None
        start = backend.start

        def lacking(*_: Any, **__: Any) -> Any:
            raise MemoryError("no room for secrets")

        with running.at_rest():
            first = pool.submit(running.ask, asking("What?", max_tokens=4))
            wait_for(lambda: running.service.answering.running == 1)
            others = [pool.submit(running.ask, asking(f"And {n}?", max_tokens=4)) for n in range(2)]
            wait_for(lambda: running.service.answering.waiting == 2)
            backend.start = lacking  # type: ignore[method-assign]
        broken = [each.result(PATIENCE) for each in (first, *others)]
        backend.start = start  # type: ignore[method-assign]
        for each in broken:
            assert (each.status_code, each.json()["error"]["code"]) == (500, "defect")
            assert "secrets" not in each.text
        assert caplog.text.count("MemoryError: no room for secrets") >= 3
        assert running.metric('d3tom_requests_total{code="500"}') == 3


@pytest.mark.parametrize(
    ("error", "status", "logged"),
    [
        (D3tomError("A denoising step returned --nothing in /a/path."), 500, True),
        (SizeError("Stage step was built for less: --gen-length."), 400, False),
    ],
)
def test_what_the_library_says_once_a_request_was_accepted(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, error: D3tomError, status: int, logged: bool
) -> None:
    with serving(bundle) as running:
        backend = running.service._front._backend
        assert backend is not None
        start = backend.start

        def failing(*_: Any, **__: Any) -> Any:
            raise error

        backend.start = failing  # type: ignore[method-assign]
        for stream in (False, True):
            found = running.ask(asking("What?", max_tokens=4, stream=stream))
            assert (found.status_code, "/a/path" in found.text) == (status, False)
        backend.start = start  # type: ignore[method-assign]
        assert ("/a/path" in caplog.text) is logged
        assert running.ask(asking("What?", max_tokens=2)).status_code == 200


UNREAD = {"max_tokens": 160, "stream": True, "d3tom": {"drafts": True, "steps": 160}}
"""A stream of more than is taken before anybody reads it: 64 KiB by uvicorn, and what the system has room for."""


def test_a_stream_that_nobody_reads_keeps_its_place(bundle: Bundle) -> None:
    with serving(bundle, limits=Limits(queue=0), send_buffer=4096) as running:
        with _sent(running.url, asking("What?", **UNREAD), receive_buffer=4096):
            wait_for(lambda: running.service.answering.running == 1)
            wait_for(lambda: running.service.answering.running == 0)
            assert running.ask(asking("What?")).status_code == 429
        wait_for(lambda: running.taken == 0)
        assert running.metric('d3tom_requests_total{code="499"}') == 1


@pytest.mark.parametrize(
    ("seconds", "sending"), [pytest.param(300.0, -298.5, id="while it is made"), pytest.param(1.5, 0.3, id="late")]
)
def test_a_stream_that_nobody_reads_is_cut_off(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, seconds: float, sending: float
) -> None:
    """However far it is: uvicorn takes the end of one for sent that it still holds."""
    monkeypatch.setattr(application, "SENDING", sending)
    with (
        serving(bundle, limits=Limits(seconds=seconds), send_buffer=4096) as running,
        _sent(running.url, asking("What?", **UNREAD), receive_buffer=4096),
    ):
        wait_for(lambda: running.taken == 1)
        wait_for(lambda: running.taken == 0)
        running.client.close()
        wait_for(lambda: not running.server.server_state.connections)


def test_pictures_are_let_go_once_they_are_embedded(bundle: Bundle) -> None:
    found: list[Work] = []
    with serving(bundle) as running:
        submit = running.service.answering.submit
        running.service.answering.submit = lambda work: (found.append(work), submit(work))[1]  # type: ignore[method-assign]
        with running.at_rest():
            asked = _sent(running.url, asking("What?", picture_bytes(), max_tokens=2))
            wait_for(lambda: running.service.answering.running == 1)
        assert asked.recv(1000)
        asked.close()
    assert [work.pictures for work in found] == [None]


@pytest.mark.parametrize("leaves", [True, False])
def test_no_more_pictures_are_decoded_for_nobody(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    """A client that leaves, or a deadline, counts while a request is prepared, from picture to picture."""
    decode, begun, goes_on, decoded = pictures._opened, threading.Event(), threading.Event(), []

    def slow(picture: Any, number: int, *rest: Any) -> Any:
        decoded.append(number)
        begun.set()
        assert goes_on.wait(PATIENCE)
        return decode(picture, number, *rest)

    monkeypatch.setattr(pictures, "_opened", slow)
    with serving(bundle, limits=Limits(seconds=300.0 if leaves else 2.0)) as running:
        asked = _sent(running.url, asking("What?", *[picture_bytes()] * 3, max_tokens=2))
        assert begun.wait(PATIENCE)
        if leaves:
            asked.close()
            wait_for(lambda: not running.server.server_state.connections)
        time.sleep(0.1 if leaves else 2.0)
        goes_on.set()
        if not leaves:
            assert b" 504 " in asked.recv(1000)
            asked.close()
        wait_for(lambda: running.taken == 0)
        assert decoded == [1]
        wait_for(lambda: running.metric(f'd3tom_requests_total{{code="{499 if leaves else 504}"}}') == 1)


def test_what_the_caller_s_own_function_raises_ends_the_opening(bundle: Bundle) -> None:
    """It would load for ever: where --json has no folder any more, for one."""

    def opened(_: Any) -> None:
        raise OSError("no such folder")

    failures: list[Exception] = []
    application_ = make_application(bundle.folder, opening=OPENING, opened=opened, failed=failures.append)
    answering = application_.state.service.answering
    answering.start()
    with pytest.raises(OSError, match="no such folder"):
        answering.wait()
    assert answering.stop(PATIENCE)
    assert [str(each) for each in failures] == ["no such folder"]
    assert application_.state.service._front._closed


def test_a_second_signal_waits_for_no_model(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a step that does not end, as loading or a batch do not for long."""
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", False)
    with listen("127.0.0.1", 0) as listening, ThreadPoolExecutor(1) as pool:
        application_ = make_application(bundle.folder, opening=OPENING, name=MODEL, wait=False)
        service, server = application_.state.service, Server(application_, listening)
        url, ended = url_of(listening), pool.submit(server.run_until_stopped)
        wait_for(lambda: service.ready and server.started)
        with service._front._lock:
            asked = _sent(url, asking("What?"))
            wait_for(lambda: service.answering.running == 1)
            server.handle_exit(signal.SIGTERM, None)
            server._told -= 2.0  # a while ago
            server.handle_exit(signal.SIGTERM, None)
            assert "before 1 requests" in str(ended.exception(PATIENCE))
            assert server.hangs
        assert service.answering.stop(PATIENCE)
        asked.close()


def _start(bundle: Bundle, tmp_path: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    """The command in a process of its own, and its address."""
    told = tmp_path / "serve.json"
    command = [sys.executable, "-m", "d3tom_export", "serve", str(bundle.folder), "--port", "0", "--provider", "cpu"]
    command += ["--no-kv-cache", "--model-name", MODEL, "--json", str(told), *more]
    # Under nohup, say, SIGHUP is ignored, and so it would be by what is started here.
    heeds = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    wait_for(lambda: told.exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process, json.loads(told.read_text())["url"]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="term"),
        pytest.param(signal.SIGINT, id="int", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, id="hup", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_is_stopped_answers_what_it_accepted(
    bundle: Bundle, model: d3.Model, tmp_path: Path, number: signal.Signals
) -> None:
    process, url = _start(bundle, tmp_path)

    def ask(n: int) -> str:
        body = asking(f"What is {n}?", max_tokens=64)
        response = httpx.post(f"{url}/chat/completions", json=body, timeout=PATIENCE)
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]

    root = url.removesuffix("/v1")
    with httpx.Client(base_url=root) as metrics, ThreadPoolExecutor(8) as pool:

        def taken() -> float:
            lines = metrics.get("/metrics").text.splitlines()
            return sum(float(x.split()[1]) for x in lines if x.startswith(("d3tom_waiting_r", "d3tom_running_r")))

        answers = [pool.submit(ask, n) for n in range(8)]
        wait_for(lambda: taken() == 8 or answers[0].done())
        process.send_signal(number)
        found = [answer.result(PATIENCE) for answer in answers]
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, errors)
    assert "Traceback" not in errors
    assert f"{MODEL} answers at {url}" in output
    assert found == [model.answer(None, f"What is {n}?", gen_length=64).text for n in range(8)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{root}/health")


@pytest.mark.slow
def test_a_second_signal_ends_a_server_at_once(bundle: Bundle, tmp_path: Path) -> None:
    process, url = _start(bundle, tmp_path)
    root = url.removesuffix("/v1")
    sent = [_sent(root, asking("What?", max_tokens=256)) for _ in range(16)]
    waiting = "d3tom_waiting_requests 15.0"
    wait_for(lambda: waiting in httpx.get(f"{root}/metrics", timeout=PATIENCE).text)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, errors
    assert "before 1" in errors
    assert "requests that it had accepted were answered" in " ".join(errors.split())
    assert "Traceback" not in errors
    for connection in sent:
        connection.close()


LOADS = """
import runpy, sys, time
from d3tom_export.api.model import Model
Model.load = lambda model: time.sleep(3600)
runpy.run_module("d3tom_export", run_name="__main__")
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_command_whose_model_loads(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LOADS, "serve", str(bundle.folder), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:

        def listens() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).status_code == 200
            except httpx.TransportError:
                return process.poll() is not None

        wait_for(listens)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell what memory a process has")
def test_memory_is_flat_under_load(bundle: Bundle) -> None:
    """64 clients, twice as long: what the second half adds is next to nothing."""
    shown = [picture_bytes(40 + 4 * n, 40, n) for n in range(8)]
    with serving(bundle, limits=Limits(queue=64), opening={**OPENING, "picture_bytes": 1 << 16}) as running:
        chance = random.Random(1)

        def ask(n: int) -> int:
            body = asking(f"What is number {n}?", shown[n % 8], max_tokens=2 + n % 3, stream=bool(n % 2))
            with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if n % 10 == chance.randrange(10):
                    return 499  # leaves
                response.read()
                return response.status_code

        def load(count: int) -> int:
            with ThreadPoolExecutor(64) as pool:
                codes = set(pool.map(ask, range(count)))
            assert codes <= {200, 499}
            wait_for(lambda: running.taken == 0)
            gc.collect()
            return _resident()

        load(256)
        before = load(256)
        after = load(768)
        assert after - before < 24 << 20, f"{(after - before) / 2**20:.1f} MiB more"
        assert threading.active_count() < 70
