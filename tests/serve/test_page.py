"""docs/serve.md: its blocks run, on a server and on two replicas of Ray Serve."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import d3tom_export as d3
from d3tom_export.bundle.folder import Bundle
from d3tom_export.serve.requests import KNOBS
from tests.serve.conftest import PATIENCE, asking, picture_bytes, serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
ASKS, REPLICAS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(CURL,) = re.findall(r"```console\n(curl .*?)```", PAGE, flags=re.DOTALL)
DIGITS = ROOT / "examples" / "lavida_tiny" / "pictures" / "digits.png"


def test_it_is_asked_as_the_page_asks(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DIGITS, tmp_path)
    monkeypatch.chdir(tmp_path)
    with serving(tiny_bundle, name=None) as running:
        here = "http://127.0.0.1:8000"
        assert here in ASKS
        exec(compile(ASKS.replace(here, running.url), "docs/serve.md", "exec"), {})
        whole, streamed = capsys.readouterr().out.split("\n")
        assert whole == streamed != ""
        if shutil.which("curl") is None:
            return
        done = subprocess.run(["bash", "-c", CURL.replace(here, running.url)], capture_output=True, text=True)
        assert '"content":"2"' in done.stdout, done.stderr
    with d3.open(tiny_bundle.folder, device="cpu", kv_cache=False) as model:
        assert whole == model.answer(DIGITS, "Which digits do you see?").text


def test_the_page_names_what_a_request_may_have() -> None:
    for name in ("ratio", "schedule", "commit", "threshold", "steps", "block_length", "step_ratio"):
        assert name in KNOBS
        assert f"`{name}`" in PAGE


DRIVER = """
import sys
import ray
from ray import serve
import replicas
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(replicas.app)
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.alone
def test_two_replicas_of_ray_serve(bundle: Bundle, tmp_path: Path) -> None:
    """The page's own, on a cluster of this machine: each answers some, and none is lost or another's."""
    if subprocess.run([sys.executable, "-c", "import ray.serve"], capture_output=True).returncode:
        reason = 'Ray Serve is not installed here; `pip install "ray[serve]"` does'
        if os.environ.get("D3TOM_NEEDS_RAY") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "replicas.py").write_text(REPLICAS)
    (tmp_path / "driver.py").write_text(DRIVER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"BUNDLE": str(bundle.folder), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    command = [sys.executable, "driver.py", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    shown = picture_bytes()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()[-2000:]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            (model,) = client.get("/v1/models").json()["data"]

            def ask(n: int) -> tuple[int, str]:
                body = asking(f"What is {n}?", shown, max_tokens=6, stream=bool(n % 2)) | {"model": model["id"]}
                response = client.post("/v1/chat/completions", json=body)
                found = re.findall(r'"content":"((?:[^"\\]|\\.)*)"', response.text)
                return response.status_code, "".join(found)

            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(ask, range(32)))
            counts = {}
            for _ in range(200):
                lines = client.get("/metrics").text.splitlines()
                values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
                counts[values["process_start_time_seconds"]] = float(values.get('d3tom_requests_total{code="200"}', 0))
                if len(counts) == 2:
                    break
            refused = client.post("/v1/chat/completions", json={})
            assert (refused.status_code, "error" in refused.json()) == (400, True)
    finally:
        process.communicate(timeout=PATIENCE)
    assert sum(counts.values()) == 32
    assert min(counts.values()) > 0, counts
    assert len(counts) == 2
    with d3.open(bundle.folder, device="cpu", kv_cache=True) as alone:
        expected = [alone.answer(shown, f"What is {n}?", gen_length=6, commit="threshold").text for n in range(32)]
    assert found == [(200, json.dumps(text, ensure_ascii=False)[1:-1]) for text in expected]
