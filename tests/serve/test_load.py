"""More requests than are taken, clients that leave, requests that take too long, and servers that are stopped."""

from __future__ import annotations

import gc
import json
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
from d3tom_export.bundle.folder import Bundle
from d3tom_export.serve.limits import Limits
from tests.serve.conftest import MODEL, OPENING, PATIENCE, asking, picture_bytes, serving, wait_for


def _sent(url: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent; nobody waits for its response."""
    content = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
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
