"""Requests as an instance gets them: what is taken, and what is refused with which words."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.triton import asking, serving


def _params(**params: Any) -> list[bytes]:
    return [json.dumps(params).encode()]


def test_a_request_is_pictures_a_question_and_settings() -> None:
    uri = b"data:image/png;base64," + base64.b64encode(b"\x89PNG")
    found = asking.asked([b"raw", uri], ["Wie gro\u00df?".encode()], _params(gen_length=4, ratio=1, stop=["."], seed=3))
    assert found == asking.Asked(
        [b"raw", b"\x89PNG"], "Wie groß?", {"gen_length": 4, "ratio": 1, "stop": ["."], "seed": 3}, True
    )
    assert asking.asked([], [b"What?"], []) == asking.Asked([], "What?", {}, True)
    assert not asking.asked([], [b"What?"], _params(stream=False)).stream
    history = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    last = {"role": "user", "content": "And now?"}
    assert asking.asked([], [b"And now?"], _params(history=history)).question == [*history, last]


@pytest.mark.parametrize(
    ("image", "prompt", "params", "says"),
    [
        ([], [], [], "PROMPT has 0 elements"),
        ([], [b"\xff"], [], "PROMPT is not UTF-8 text: byte 0 is not"),
        ([], [b"?"], [b"{"], "PARAMS is no JSON object of settings"),
        ([], [b"?"], [b"[1]"], "PARAMS is no JSON object of settings"),
        ([], [b"?"], [b" " * (1 << 20) + b"{}"], "PARAMS has 1,048,578 bytes"),
        ([], [b"?"], _params(gen_lenght=3), "'gen_lenght' is no setting of an answer; did you mean gen_length"),
        ([], [b"?"], _params(gen_length="3"), "PARAMS, gen_length: expected int, got str"),
        ([], [b"?"], _params(gen_length=True), "PARAMS, gen_length: expected int, got bool"),
        ([], [b"?"], _params(stop=5), "PARAMS, stop: expected"),
        ([], [b"?"], _params(commit="never"), "PARAMS, commit: invalid enum value 'never'"),
        ([], [b"?"], _params(stream=1), "PARAMS, stream: expected bool"),
        ([], [b"?"], _params(history="before"), "PARAMS, history: expected array"),
        ([b"data:image/png,abc"], [b"?"], [], "is no picture's: expected data:image/png;base64"),
        ([b"data:text/plain;base64,YQ=="], [b"?"], [], "is no picture's: expected data:image/png;base64"),
        ([b"data:image/png;base64,a"], [b"?"], [], "is no base64"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    image: list[bytes], prompt: list[bytes], params: list[bytes], says: str
) -> None:
    with pytest.raises(D3tomError) as refused:
        asking.asked(image, prompt, params)
    assert says in str(refused.value)
    assert "docs/triton.md" in str(refused.value)


def test_how_a_bundle_is_opened_survives_the_configuration() -> None:
    opening = {"backend": "onnxruntime", "device": "cpu", "kv_cache": False, "precision": None, "cuda_graphs": True}
    written = serving.parameters(opening)
    assert written == {"backend": "onnxruntime", "device": "cpu", "kv_cache": "false", "cuda_graphs": "true"}
    config = {"parameters": {name: {"string_value": word} for name, word in written.items()}}
    config["parameters"]["FORCE_CPU_ONLY_INPUT_TENSORS"] = {"string_value": "no"}  # the server's own
    assert serving.opening(config) == {name: value for name, value in opening.items() if value is not None}


@pytest.mark.parametrize(("outer", "expected"), [("", "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b"), ("0", "1")])
def test_an_instance_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, outer: str, expected: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)  # and put back afterwards
    serving.claim_share({"model_instance_kind": "GPU", "model_instance_device_id": "1"}, {})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_instances_on_cpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[int] = []
    monkeypatch.setattr(serving, "claim", claimed.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for count in (1, 2, 3, 64):
        serving.claim_share({"model_instance_kind": "CPU"}, {"instance_group": [{"count": count}]})
    assert claimed == [4, 2, 1]
