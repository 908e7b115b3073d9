"""What is not answered: one paragraph in OpenAI's shape for every bad request, and the server goes on."""

from __future__ import annotations

import io
import json
from typing import Any

import openai
import pytest
from PIL import Image

from d3tom_export.bundle.folder import Bundle
from d3tom_export.serve.failures import RequestError
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.requests import read_chat
from tests.serve.conftest import MODEL, OPENING, Running, asking, data_uri, picture_bytes, serving

CHAT = "/v1/chat/completions"


def _shown(url: object) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]}


def _said(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": list(messages), **more}


def _bomb(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG", compress_level=9)
    return file.getvalue()


ASKED = {"role": "user", "content": "What?"}
PART = {"type": "text", "text": "?"}
BODIES: list[tuple[Any, int, str | None, str]] = [
    (b"{", 400, None, "cannot be read as JSON"),
    (b"", 400, None, "cannot be read as JSON"),
    (b"[]", 400, None, "expected an object"),
    (b"\xff", 400, None, "not UTF-8"),
    (b'{"model": "tests", "model": "tests"}', 400, None, "stands there twice"),
    (b"[" * 5000, 400, None, "nested more than"),
    (b'{"model": NaN}', 400, None, "is no number of JSON"),
    ({"model": MODEL}, 400, None, "missing required field messages"),
    ({"messages": [ASKED]}, 400, None, "missing required field model"),
    (_said(), 400, None, "length >= 1"),
    (_said("What?"), 400, None, "messages[0]"),
    (_said({"role": "user"}), 400, None, "has content None"),
    (_said({"role": "user", "content": 5}), 400, None, "has content 5"),
    (_said({"role": "user", "content": []}), 400, None, "has content []"),
    (_said({"role": "tool", "content": "x"}), 400, None, "role 'tool'"),
    (_said({"role": ["user"], "content": "x"}), 400, None, "expected system, user"),
    (_said({"role": "assistant", "content": "x"}), 400, None, "expected the user's"),
    (_said(ASKED, {"role": "assistant", "content": "x"}), 400, None, "what is answered is a user's"),
    (_said({**ASKED, "tool_calls": [{"id": 1}]}), 400, None, "tool_calls, which cannot be done"),
    (_said({"role": "user", "content": [{"type": "input_audio"}]}), 400, None, "expected a part of type text or"),
    (_said({"role": "user", "content": ["text"]}), 400, None, "messages[0].content[0]"),
    (_said({"role": "user", "content": "<image> what?"}), 400, None, "places 1 pictures with <image> and brings 0"),
    (_said({**ASKED, "content": "\ud800"}), 400, None, "not UTF-8 text"),
    ({**_said(ASKED), "model": "gpt-4o"}, 404, "model_not_found", "no model 'gpt-4o' here; this server has 'tests'"),
    ({**_said(ASKED), "model": 5}, 400, None, "model: Expected str, got int"),
    (_said(ASKED, max_tokens=0), 400, None, "max_tokens: Expected int >= 1"),
    (_said(ASKED, max_tokens=True), 400, None, "max_tokens: Expected int"),
    (_said(ASKED, max_tokens=65), 400, "max_tokens_too_large", "answers of this server have 64 at most"),
    (_said(ASKED, max_tokens=5, max_completion_tokens=6), 400, None, "say the same"),
    (_said(ASKED, temperature=-1), 400, None, "temperature: Expected float >= 0"),
    (_said(ASKED, temperature="hot"), 400, None, "temperature: Expected float"),
    (_said(ASKED, seed=-1), 400, None, "seed: Expected int >= 0"),
    (_said(ASKED, top_p=0.5), 400, None, "top_p"),
    (_said(ASKED, stop=""), 400, None, "none of them empty"),
    (_said(ASKED, stop=["x"] * 17), 400, None, "up to 16 texts"),
    (_said(ASKED, stop=["x", "y" * 257]), 400, None, "256 characters at most"),
    (_said(ASKED, stream="yes"), 400, None, "stream: Expected bool"),
    (_said(ASKED, n=2), 400, "unsupported_parameter", "n 2 cannot be done here"),
    (_said(ASKED, tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools"),
    (_said(ASKED, response_format={"type": "json_object"}), 400, "unsupported_parameter", "response_format"),
    (_said(ASKED, nonsense=1), 400, "unknown_parameter", "nonsense is no field"),
    (_said(ASKED, d3tom={"gen_length": 4}), 400, None, "d3tom.gen_length is no setting of an answer here"),
    (_said(ASKED, d3tom={"drafts": 1}), 400, None, "d3tom.drafts is 1"),
    (_said(ASKED, d3tom={"ratio": 2}), 400, None, "outside [0, 1)"),
    (_said(ASKED, d3tom={"threshold": 0.5}), 400, None, "threshold is for commit rule"),
    (_said(ASKED, max_tokens=12, d3tom={"block_length": 5}), 400, None, "block length 5 does not divide"),
    (_said({"role": "user", "content": "word " * 700}), 400, None, "exceeds this model's limit of 640"),
    (_said({"role": "user", "content": "w" * 180_000}), 400, None, "characters"),
    (_shown("http://127.0.0.1:1/secret.png"), 400, "invalid_image_url", "fetches nothing"),
    (_shown("https://example.org/p.png"), 400, "invalid_image_url", "send the picture itself"),
    (_shown("file:///etc/passwd"), 400, "invalid_image_url", "fetches nothing"),
    (_shown("data:text/html;base64,AAAA"), 400, "invalid_image_url", "data:image/png"),
    (_shown("data:image/png,AAAA"), 400, "invalid_image_url", "data:image/png"),
    (_shown("data:image/png;base64,A*A"), 400, "invalid_base64", "is no base64"),
    (_shown("data:image/png;base64,"), 400, "invalid_image", "not a picture"),
    (_shown(data_uri(b"GIF89a nothing")), 400, "invalid_image", "not a picture"),
    (_shown(data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 400, "invalid_image", "not a picture"),
    (_shown(data_uri(picture_bytes()[:200])), 400, None, "damaged or unreadable"),
    (_shown(data_uri(picture_bytes(101, 100))), 400, "image_too_large", "101 x 100 pixels, more than the 10,000"),
    (_shown(data_uri(_bomb(20_000))), 400, "invalid_image", "too large"),
    (_shown(5), 400, None, "has no text image_url"),
    (asking("?", *[picture_bytes()] * 3), 400, None, "more than 2 pictures"),
    (b'{"model": "' + b"x" * 200_000 + b'"}', 413, "body_too_large", "more than the 200,000 bytes"),
]  # fmt: skip


def _check(response: Any, status: int, code: str | None, says: str) -> None:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert error["code"] == code
    assert "\n" not in error["message"]
    assert "--" not in error["message"]
    assert error["type"] in ("invalid_request_error", "authentication_error", "rate_limit_error", "server_error")


def test_bad_bodies(running: Running) -> None:
    before, refused = running.metric("d3tom_requests_total"), 0
    for body, status, code, says in BODIES:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = running.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        _check(response, status, code, says)
        refused += 1
    assert running.taken == 0
    assert running.metric("d3tom_requests_total") == before + refused
    assert running.ask(asking("?", max_tokens=2)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code", "says"),
    [
        ("GET", CHAT, {}, 405, None, "Method Not Allowed"),
        ("POST", "/v1/completions", {}, 404, None, "POST /v1/chat/completions is what answers"),
        ("GET", "/", {}, 404, None, "Not Found"),
        ("GET", "/v1/models/other", {}, 404, "model_not_found", "no such model"),
        ("POST", CHAT, {"Content-Type": "text/plain"}, 415, "content_type", "Content-Type: application/json"),
        ("POST", CHAT, {"Content-Type": ""}, 415, "content_type", "The body is JSON"),
    ],
)
def test_bad_calls(
    running: Running, method: str, path: str, headers: dict[str, str], status: int, code: str | None, says: str
) -> None:
    body = json.dumps(asking("?")).encode() if method == "POST" else None
    _check(running.client.request(method, path, content=body, headers=headers), status, code, says)


def test_what_asks_for_nothing_is_taken(running: Running) -> None:
    """Values of clients that send every field there is."""
    nothing = {
        "stream_options": {"include_usage": None}, "reasoning_effort": "low", "verbosity": "medium", "top_logprobs": 0,
        "functions": [], "function_call": "none",
    }  # fmt: skip
    response = running.ask(_said(ASKED, max_tokens=2, **nothing))
    assert response.status_code == 200, response.text
    _check(running.ask(_said(ASKED, verbosity="low")), 400, "unsupported_parameter", "verbosity 'low' cannot be done")


def test_a_body_of_many_small_things_is_not_parsed() -> None:
    """It would take thirty times its size, and the time of others."""
    with pytest.raises(RequestError, match="more than 200,000 elements"):
        read_chat(b'{"model": [' + b"[]," * 150_000 + b"[]]}", Limits())


def test_the_pixels_of_all_pictures_together() -> None:
    body = json.dumps(asking("?", *[picture_bytes(100, 100)] * 5)).encode()
    assert len(read_chat(body, Limits(pixels=12_500)).pictures) == 5
    with pytest.raises(RequestError, match="more than the 48,000 pixels that this server decodes for one request"):
        read_chat(body, Limits(pixels=12_000))


def test_a_body_without_a_length_is_counted_as_it_comes(running: Running) -> None:
    def parts() -> Any:
        for _ in range(300):
            yield b" " * 1000

    response = running.client.post(CHAT, content=parts(), headers={"Content-Type": "application/json"})
    _check(response, 413, "body_too_large", "more than the 200,000 bytes")
    assert running.taken == 0


def test_openais_client_raises_its_own_errors(running: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        running.openai.chat.completions.create(model="other", messages=[ASKED])  # type: ignore[list-item]
    with pytest.raises(openai.BadRequestError, match="fetches nothing") as raised:
        running.openai.chat.completions.create(**_shown("https://example.org/p.png"))
    assert raised.value.code == "invalid_image_url"


def test_models_are_listed(running: Running) -> None:
    (found,) = running.openai.models.list().data
    assert (found.id, found.object) == (MODEL, "model")
    assert running.openai.models.retrieve(MODEL).id == MODEL


def test_keys_let_in(bundle: Bundle) -> None:
    keys = ("a-key-of-the-tests-1", "a-key-of-the-tests-2")
    with serving(bundle, keys=keys) as running:
        bad = [
            {},
            {"Authorization": ""},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer a-key-of-the-tests-3"},
            {"Authorization": f"Basic {keys[0]}"},
            {"Authorization": keys[0]},
            {"Authorization": f"Bearer {keys[0]}x"},
            {"Authorization": b"Bearer \xff\xfe"},
        ]
        for headers in bad:
            response = running.ask(asking("?"), headers=headers)
            _check(response, 401, "invalid_api_key", "no API key of this server")
            assert response.headers["www-authenticate"] == "Bearer"
            assert running.client.get("/v1/models", headers=headers).status_code == 401
        for key in keys:
            found = running.openai.with_options(api_key=key).chat.completions.create(**asking("?", max_tokens=2))
            assert found.choices
        for path in ("/health", "/ready", "/metrics"):
            assert running.client.get(path).status_code == 200


def test_pages_in_a_browser_have_no_say(bundle: Bundle) -> None:
    """A name that leads to this address is not enough: whoever is asked for must be this machine."""
    with serving(bundle, hosts={"localhost", "127.0.0.1"}, opening=OPENING) as running:
        for host, status in (("evil.example", 403), ("", 403), ("localhost:1", 200), ("127.0.0.1", 200)):
            response = running.ask(asking("?", max_tokens=2), headers={"Host": host})
            assert response.status_code == status, host
            for path in ("/metrics", "/health", "/ready", "/v1/models"):
                assert running.client.get(path, headers={"Host": host}).status_code == status, (path, host)
