"""A real server on a repository: streamed steps, many clients, cancelled and bad requests, a kill and a restart."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import d3tom_export as d3
from d3tom_export.bundle.folder import Bundle
from d3tom_export.triton.repository import RepositoryRequest, write_repository
from tests.conftest import picture
from tests.triton.client import Client, RefusedError
from tests.triton.server import Environment, Server, environment

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PAGE = Path(__file__).parents[2] / "docs" / "triton.md"

LONG = {"gen_length": 256, "steps": 256, "early_exit": False}
"""An answer of many steps."""


def _png(number: int) -> bytes:
    content = io.BytesIO()
    picture(40 + 10 * number, 40, number).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without cache, one instance; what it needs is installed beside the server."""
    output = tmp_path_factory.mktemp("repository") / "models"
    write_repository(RepositoryRequest(bundle.folder, output, {"kv_cache": False}))
    return output


@pytest.fixture(scope="module")
def made(repository: Path) -> Environment:
    found = environment(repository / "requirements.txt")
    with (repository / "answer" / "1" / "site-packages.txt").open("a") as file:
        file.write(f"{found.packages}\n")
    return found


@pytest.fixture(scope="module")
def server(made: Environment, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(made, repository, tmp_path_factory.mktemp("log") / "server.txt")
    try:
        yield running.ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[d3.Model]:
    """The same bundle in this process, under another NumPy."""
    with d3.open(bundle.folder, device="cpu", kv_cache=False) as opened:
        yield opened


def test_the_servers_numpy_is_another(made: Environment) -> None:
    assert [path.name for path in made.packages.glob("numpy-*")] == ["numpy-1.26.4.dist-info"]
    assert np.lib.NumpyVersion(np.__version__) >= "2.0.0"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gen_length": 12, "ratio": 0.5, "stop": ["zz"]},
        {"temperature": 0.7, "seed": 3},
        {"commit": "threshold"},
    ],
)
def test_steps_are_streamed_and_are_the_apis(server: Server, model: d3.Model, settings: dict[str, Any]) -> None:
    with Client(server.grpc) as client:
        client.ask(_png(1), "What is it?", **settings)
        *steps, last = client.replies()
    expected = model.steps(_png(1), "What is it?", **settings)
    told = [(step.text, step.token_ids, step.number) for step in expected]
    assert [(reply.text, reply.tokens, reply.step) for reply in steps] == told
    assert not any(reply.final for reply in steps)
    answer = expected.answer
    assert (last.text, last.tokens, last.step, last.final) == (answer.text, answer.token_ids, answer.steps, True)


def test_pictures_are_several_or_none_and_turns_are_many(server: Server, model: d3.Model) -> None:
    history = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A square."}]
    with Client(server.grpc) as client:
        client.ask(None, "Hello?")
        client.send(IMAGE=[_png(1), _png(2)], PROMPT=[b"<image> or <image>?"])
        client.ask(_png(1), "And now?", history=history, stream=False)
        alone, two, turns = (list(client.replies()) for _ in range(3))
    assert alone[-1].tokens == model.answer(None, "Hello?").token_ids
    assert two[-1].tokens == model.answer([_png(1), _png(2)], "<image> or <image>?").token_ids
    question = [*history, {"role": "user", "content": "And now?"}]
    assert [reply.tokens for reply in turns] == [model.answer(_png(1), question).token_ids]


def test_many_clients_get_their_own_answers(server: Server, model: d3.Model) -> None:
    def ask(number: int) -> list[tuple[int, ...]]:
        with Client(server.grpc) as client:
            for question in range(3):
                client.ask(_png(number), f"What is {question}?")
            return [list(client.replies())[-1].tokens for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    for number, answers in enumerate(found):
        expected = [model.answer(_png(number), f"What is {question}?").token_ids for question in range(3)]
        assert answers == expected


def test_a_cancelled_request_ends_with_its_step(server: Server) -> None:
    instances = server.instances()
    client, waiting = Client(server.grpc), Client(server.grpc)
    client.ask(_png(1), "What?", **LONG)
    replies = client.replies()
    assert [next(replies).step for _ in range(2)] == [1, 2]
    waiting.ask(_png(2), "What?", **LONG)  # behind it, and given up before its turn
    time.sleep(0.1)
    waiting.close(cancel=True)
    client.close(cancel=True)
    with Client(server.grpc) as other:
        other.ask(_png(1), "What?", gen_length=4)
        assert list(other.replies())[-1].final
    had = sorted(map(int, re.findall(r"A request was cancelled; steps that it had: (\d+)", server.said())))
    assert len(had) == 2
    assert had[0] == 0
    assert had[1] < LONG["steps"] / 2
    assert server.instances() == instances


BAD: list[tuple[dict[str, list[bytes]], str]] = [
    ({"IMAGE": [b"no picture"], "PROMPT": [b"?"]}, "picture 1 of the prompt"),
    ({"IMAGE": [b""], "PROMPT": [b"?"]}, "picture 1 of the prompt"),
    ({"IMAGE": [b"/etc/passwd"], "PROMPT": [b"?"]}, "picture 1 of the prompt"),
    ({"IMAGE": [b"data:image/png;base64,!"], "PROMPT": [b"?"]}, "is no base64"),
    ({"IMAGE": [_png(0)[:60]], "PROMPT": [b"?"]}, "picture 1 of the prompt"),
    ({"PROMPT": [b"\xff\xfe"]}, "PROMPT is not UTF-8"),
    ({"PROMPT": [b"one", b"two"]}, "PROMPT"),
    ({"IMAGE": [_png(0)]}, "PROMPT"),
    ({"PROMPT": [b"<image>?"]}, "picture"),
    ({"PROMPT": [b"?"], "PARAMS": [b"{"]}, "PARAMS is no JSON object"),
    ({"PROMPT": [b"?"], "PARAMS": [b"[" * 100_000]}, "PARAMS is no JSON object"),
    ({"PROMPT": [b"?"], "PARAMS": [b'{"gen_lenght": 4}']}, "did you mean gen_length"),
    ({"PROMPT": [b"?"], "PARAMS": [b'{"gen_length": "4"}']}, "expected int"),
    ({"PROMPT": [b"?"], "PARAMS": [b'{"gen_length": 100000}']}, "exceeds this model's limit"),
    ({"PROMPT": [b"?"], "PARAMS": [b'{"ratio": 2}']}, "ratio"),
    ({"PROMPT": [b"?"], "PARAMS": [b'{"share_prefix": true}']}, "share"),
    ({"PROMPT": [b"?"], "PARAMS": [b'{"history": [{"role": "dog", "content": "?"}]}']}, "no conversation"),
]


def test_bad_input_is_answered_with_an_error_and_harms_nobody(server: Server, model: d3.Model) -> None:
    instances = server.instances()
    expected = model.answer(_png(1), "What?").token_ids
    for tensors, says in BAD:
        with Client(server.grpc) as client:
            client.send(**tensors)
            with pytest.raises(RefusedError) as refused:
                list(client.replies())
            assert says in str(refused.value), tensors
            assert "Traceback" not in str(refused.value)
            assert "\n" not in str(refused.value).strip()
    with Client(server.grpc) as client:
        client.ask(_png(1), "What?")
        assert list(client.replies())[-1].tokens == expected
    assert server.instances() == instances
    assert server.process.poll() is None


def _post(server: Server, method: str, **fields: str) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http}/v2/models/answer/{method}", json.dumps(fields).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def test_it_can_be_asked_over_http(server: Server, model: d3.Model) -> None:
    uri = "data:image/png;base64," + base64.b64encode(_png(1)).decode()
    answer = model.answer(_png(1), "What?")
    lines = _post(server, "generate_stream", PROMPT="What?", IMAGE=uri).splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [each["STEP"] for each in told] == [*range(1, answer.steps + 1), answer.steps]
    assert [each["FINAL"] for each in told] == [False] * answer.steps + [True]
    assert (told[-1]["TEXT"], told[-1]["TOKENS"]) == (answer.text, list(answer.token_ids))
    alone = json.loads(_post(server, "generate", PROMPT="What?", IMAGE=uri, PARAMS='{"stream": false}'))
    assert alone["TOKENS"] == list(answer.token_ids)
    with pytest.raises(urllib.error.HTTPError) as refused:
        _post(server, "generate", PROMPT="What?", PARAMS='{"ratio": 2}')
    assert "ratio" in refused.value.read().decode()


def test_the_pages_block_runs(
    server: Server, model: d3.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "digits.png").write_bytes(_png(3))
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("127.0.0.1:8001", f"127.0.0.1:{server.grpc}"), PAGE.name, "exec"), {})
    answer = model.answer(_png(3), "Which digits do you see?", gen_length=16)
    # Texts of random weights have breaks of lines in them.
    assert capsys.readouterr().out.rstrip("\n").endswith(answer.text)


def test_a_killed_server_starts_again(made: Environment, repository: Path, model: d3.Model, tmp_path: Path) -> None:
    expected = model.answer(_png(1), "What?").token_ids
    killed = Server(made, repository, tmp_path / "first.txt").ready()
    client = Client(killed.grpc)
    client.ask(_png(1), "What?", **LONG)
    assert next(client.replies()).step == 1
    killed.kill()
    with pytest.raises(RefusedError):
        list(client.replies())
    client.close()
    again = Server(made, repository, tmp_path / "second.txt").ready()
    try:
        with Client(again.grpc) as client:
            client.ask(_png(1), "What?")
            assert list(client.replies())[-1].tokens == expected
    finally:
        again.stop()


def test_two_instances_answer_side_by_side(made: Environment, bundle: Bundle, model: d3.Model, tmp_path: Path) -> None:
    request = RepositoryRequest(
        bundle.folder, tmp_path / "models", {"kv_cache": False}, 2, (str(made.packages),), link=True
    )
    write_repository(request)
    running = Server(made, tmp_path / "models", tmp_path / "server.txt").ready()
    try:
        assert len(running.instances()) == 2
        with Client(running.grpc) as slow, Client(running.grpc) as quick:
            slow.ask(_png(1), "What?", **LONG)
            assert next(slow.replies()).step == 1
            quick.ask(_png(2), "What?")
            assert list(quick.replies())[-1].tokens == model.answer(_png(2), "What?").token_ids
            *steps, last = slow.replies()
            assert last.step == LONG["steps"]
            assert steps  # the other's answer did not wait for this one
    finally:
        running.stop()


@pytest.mark.parametrize(("packages", "says"), [("", "No module named 'numpy'. Install"), ("newer", "numpy>=1.26,<2")])
def test_a_server_that_lacks_packages_says_so(
    made: Environment, repository: Path, tmp_path: Path, packages: str, says: str
) -> None:
    """The Python that it embeds knows none of ours, and its backend does not understand NumPy 2."""
    shutil.copytree(repository, tmp_path / "models")
    folder = Path(np.__file__).parents[1] if packages else ""
    (tmp_path / "models" / "answer" / "1" / "site-packages.txt").write_text(f"{folder}\n")
    running = Server(made, tmp_path / "models", tmp_path / "server.txt")
    try:
        assert running.process.wait(60) != 0
    finally:
        running.stop()
    assert says in running.said()
