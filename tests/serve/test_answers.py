"""What a server answers is what the model answers, whole or streamed, asked by OpenAI's own client."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import d3tom_export as d3
from d3tom_export.api import answers
from d3tom_export.bundle.folder import Bundle
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.stops import StopTexts
from tests.serve.conftest import MODEL, Running, asking, data_uri, picture_bytes, serving


def _create(running: Running, body: dict[str, Any], **more: Any) -> Any:
    extra = {"extra_body": {"d3tom": body.pop("d3tom")}} if "d3tom" in body else {}
    return running.openai.chat.completions.create(**body, **extra, **more)


def test_an_answer_about_a_picture(running: Running, model: d3.Model) -> None:
    shown = picture_bytes()
    found = _create(running, asking("What is it?", shown, max_tokens=6))
    expected = model.answer(shown, "What is it?", gen_length=6)
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    ends = bool(set(expected.token_ids) & set(expected.generation.end_ids))
    assert choice.finish_reason == ("stop" if ends else "length")
    assert (found.object, found.model) == ("chat.completion", MODEL)
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.token_ids)
    assert found.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
    more = found.model_extra["d3tom"]
    assert (more["steps"], more["gen_length"], more["visual_tokens"]) == (expected.steps, 6, expected.visual_tokens)


def test_the_length_is_the_bundles_unless_given(running: Running, model: d3.Model) -> None:
    found = _create(running, asking("What?"))
    expected = model.answer(None, "What?")
    assert found.choices[0].message.content == expected.text
    assert found.model_extra["d3tom"]["gen_length"] == model.describe().generation.gen_length
    same = _create(running, asking("What?", max_completion_tokens=4))
    assert same.model_extra["d3tom"]["gen_length"] == 4


def test_no_answer_is_longer_than_the_server_allows(bundle: Bundle, model: d3.Model) -> None:
    """Nor one whose request says nothing of its length: that of the bundle is more."""
    assert model.describe().generation.gen_length > 4
    with serving(bundle, limits=Limits(tokens=4)) as running:
        for knobs in ({}, {"steps": 2}):
            found = _create(running, asking("What?", d3tom=dict(knobs)))
            assert found.choices[0].message.content == model.answer(None, "What?", gen_length=4, **knobs).text
            assert found.model_extra["d3tom"]["gen_length"] == 4


def test_a_conversation_with_several_pictures(running: Running, model: d3.Model) -> None:
    first, second = picture_bytes(seed=1), picture_bytes(60, 30, 2)

    def part(content: bytes) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_uri(content), "detail": "high"}}

    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part(first)]},
        {"role": "assistant", "content": "A dot.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [part(second), {"type": "text", "text": "And <image>?"}]},
    ]
    found = _create(running, {"model": MODEL, "messages": messages, "max_tokens": 6})
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A dot."},
        {"role": "user", "content": "And <image>?"},
    ]
    expected = model.answer([first, second], turns, gen_length=6)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens
    # Without places of their own, pictures come before what is said of them, as `run` has it.
    plain = _create(running, asking("What?", first, second, max_tokens=4))
    assert plain.choices[0].message.content == model.answer([first, second], "What?", gen_length=4).text


def test_settings_of_a_request(running: Running, model: d3.Model) -> None:
    knobs = {"block_length": 4, "steps": 6, "ratio": 0.2, "schedule": "fixed"}
    shown = picture_bytes()
    found = _create(running, asking("What?", shown, max_tokens=12, temperature=0.9, seed=7, d3tom=dict(knobs)))
    expected = model.answer(shown, "What?", gen_length=12, temperature=0.9, seed=7, **knobs)
    assert found.choices[0].message.content == expected.text
    assert found.model_extra["d3tom"]["steps"] == expected.steps
    assert found.model_extra["d3tom"]["seed"] == 7
    # Without a seed it is drawn, told, and gives the same answer again.
    drawn = _create(running, asking("What?", shown, max_tokens=12, temperature=0.9))
    seed = drawn.model_extra["d3tom"]["seed"]
    again = model.answer(shown, "What?", gen_length=12, temperature=0.9, seed=seed)
    assert drawn.choices[0].message.content == again.text


def test_stops_are_looked_for_in_the_models_thread(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's thread has all clients to serve, and a text may take a while to be cut."""
    threads = set()

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            threads.add(threading.current_thread().name)
            return function(*arguments)

        return call

    monkeypatch.setattr(StopTexts, "said", watched(StopTexts.said))
    monkeypatch.setattr(answers, "final_text", watched(answers.final_text))
    assert list(_create(running, asking("What?", max_tokens=4, stop="x"), stream=True))
    assert threads == {"d3tom-model-0"}


def test_a_stop_text_ends_an_answer(running: Running, model: d3.Model) -> None:
    whole = model.answer(None, "What is it?", gen_length=16)
    stop = whole.text[5:7]
    found = _create(running, asking("What is it?", max_tokens=16, stop=["nowhere", stop]))
    text = found.choices[0].message.content
    assert stop not in text
    assert found.choices[0].finish_reason == "stop"
    stream = _create(running, asking("What is it?", max_tokens=16, stop=["nowhere", stop]), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_stream_only_grows_into_the_answer(running: Running, model: d3.Model, block_length: int | None) -> None:
    shown = picture_bytes()
    knobs = {} if block_length is None else {"block_length": block_length}
    body = asking("What is it?", shown, max_tokens=16, d3tom=knobs | {"drafts": True})
    stream = _create(running, body, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    steps = list(model.steps(shown, "What is it?", gen_length=16, **knobs))
    expected = model.answer(shown, "What is it?", gen_length=16, **knobs)
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    drafts = [chunk.model_extra["d3tom"] for chunk in chunks if "draft" in (chunk.model_extra.get("d3tom") or {})]
    assert [draft["draft"] for draft in drafts] == [step.text for step in steps]
    assert [draft["kept"] for draft in drafts] == [step.kept for step in steps]
    said = ""
    for chunk in chunks:
        said += chunk.choices[0].delta.content or ""
        assert expected.text.startswith(said)
        assert chunk.usage is None
    assert said == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks].count(None) == len(chunks) - 1
    assert (last.choices, last.usage.completion_tokens) == ([], len(expected.token_ids))
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    growing = sum(bool(chunk.choices[0].delta.content) for chunk in chunks)
    assert growing > 1 or block_length is None  # blocks follow one another


def test_a_stream_is_of_server_sent_events(running: Running) -> None:
    with running.client.stream("POST", "/v1/chat/completions", json=asking("?", max_tokens=4, stream=True)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = b"".join(response.iter_raw()).decode()
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(each.removeprefix("data: "))["object"] == "chat.completion.chunk" for each in events)


def test_what_is_refused_before_a_stream_begins_has_a_status(running: Running) -> None:
    response = running.ask(asking("?", stream=True, max_tokens=65))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "max_tokens_too_large")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="one"),
        pytest.param({"limits": Limits(queue=64, batch=4)}, id="batch", marks=pytest.mark.slow),
        pytest.param({"models": 2}, id="two", marks=pytest.mark.slow),
    ],
)
def test_sixty_four_clients_get_their_own_answers(bundle: Bundle, model: d3.Model, how: dict[str, Any]) -> None:
    """Half of them streamed: none is lost, and none is another's."""
    shown = [picture_bytes(40 + 8 * n, 40, n) for n in range(4)]

    def question(n: int) -> tuple[str, bytes]:
        return f"What is number {n}?" * (1 + n % 3), shown[n % 4]

    with serving(bundle, **how) as running:

        def ask(n: int) -> str:
            body = asking(*question(n), max_tokens=4 + n % 3, temperature=1, seed=n)
            if n % 2:
                return _create(running, body).choices[0].message.content
            stream = _create(running, body, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(64)))
        assert running.metric("d3tom_requests_total") == 64
        assert running.metric("d3tom_running_requests") == running.metric("d3tom_waiting_requests") == 0
        assert running.taken == 0
    expected = []
    for n in range(64):
        text, content = question(n)
        expected.append(model.answer(content, text, gen_length=4 + n % 3, temperature=1, seed=n).text)
    assert len(set(expected)) > 32
    assert found == expected
