"""Questions and conversations written out by a template, and conversations that are read from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.families import lavida_dream, lavida_llada, llada, llada_v
from d3tom_export.prompt.conversation import Turn, conversation, joined, read_conversation, with_pictures
from d3tom_export.prompt.settings import PromptSettings

FAMILIES = (llada.FAMILY, lavida_llada.FAMILY, llada_v.FAMILY, lavida_dream.FAMILY)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_question_is_asked_as_its_family_does(family: Any) -> None:
    text = joined(family.template, conversation(" Hello? ", family.system))
    if family is llada.FAMILY:
        assert family.system is None
        system = ""
    else:
        assert family.system.startswith("You are a helpful language and vision assistant. You are able to")
        system = family.system
    if family is lavida_dream.FAMILY:
        assert text == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n Hello? <|im_end|>\n<|im_start|>assistant\n"
        )
        return
    turn = f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>" if system else ""
    assert text == (
        f"<|startoftext|>{turn}<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_turns_follow_one_another() -> None:
    turns = (Turn("user", "a"), Turn("assistant", " b "), Turn("user", "c"))
    parts = replace(llada.TEMPLATE, start="<", to_assistant="|", to_user="/", strips=("user",))
    assert joined(parts, turns) == "<a| b /c|"
    assert joined(replace(parts, to_answer=">"), turns) == "<a| b /c>"
    system = (Turn("system", "s"), *turns)
    assert joined(replace(parts, before_system="[", after_system="]"), system) == "[s]a| b /c|"
    with pytest.raises(D3tomError, match=r"no place for a system text\. Ask without --system"):
        joined(replace(parts, before_system=None, after_system=None), system)
    with pytest.raises(D3tomError, match="takes one question and no conversation of several turns"):
        joined(replace(parts, to_user=None), turns)


def test_pictures_stand_in_user_turns() -> None:
    turns = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    assert with_pictures(turns, 2)[1] == Turn("user", "<image>\n<image>\na")
    placed = (*turns[:3], Turn("user", "<image> c"))
    assert with_pictures(placed, 1) == placed
    with pytest.raises(D3tomError, match="places 1 pictures with <image> and 2 were given"):
        with_pictures(placed, 2)
    for turn in (Turn("system", "<image>"), Turn("assistant", "<image>")):
        with pytest.raises(D3tomError, match=f"The {turn.role} turn has <image>"):
            with_pictures((turn, Turn("user", "c")), 1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_is_read(tmp_path: Path, wrapped: bool) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "é"},
    ]
    path = tmp_path / "conversation.json"
    path.write_text(json.dumps({"messages": messages, "other": 1} if wrapped else messages))
    turns = (Turn("system", "s"), Turn("user", "A<image>\nB"), Turn("assistant", "b"), Turn("user", "é"))
    assert read_conversation(path) == turns


def _user(content: Any = "a", role: Any = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("", "is no conversation"),
        ("7", "neither a list of turns"),
        ("[]", "neither a list of turns"),
        ({"turns": []}, "neither a list of turns"),
        ([7], "turn 1 has 'int'"),
        ([{"role": "user"}], r"turn 1 has \['role'\], expected role and content"),
        ([_user(name="x")], "turn 1 has"),
        ([_user(role="tool")], "turn 1 has role 'tool'"),
        ([_user(role=["user"])], "turn 1 has role"),
        ([_user(7)], "turn 1 has content 7"),
        ([_user([{"type": "image", "url": "file:///etc/passwd"}])], "whose picture comes with --image"),
        ([_user([{"type": "text", "text": 1}])], "turn 1 has a part"),
        ([_user([[]])], "turn 1 has a part"),
        ([_user(role="assistant")], "turn 1 is the assistant's, expected the user's"),
        ([_user(), _user()], "turn 2 is the user's, expected the assistant's"),
        ([_user(), _user(role="system")], "turn 2 is the system's"),
        ([_user(role="system")], "its last turn is the system's"),
        ([_user(), _user(role="assistant")], "its last turn is the assistant's"),
        ([_user(), _user(role="assistant")] * 3000, "has 6,000 turns, at most 4,096"),
        ('[{"role": "user", "role": "user", "content": "a"}]', "'role' stands there twice"),
        ("[" * 100_000, "nested more than 32 levels deep"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, document: Any, says: str) -> None:
    path = tmp_path / "conversation.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(D3tomError, match=says):
        read_conversation(path)


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "conversation.json"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(D3tomError, match="has 16,777,217 bytes, at most"):
        read_conversation(path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_settings_are_stored_as_they_are(family: Any) -> None:
    settings = PromptSettings.of_family(family, drop_token_after_image=False)
    assert PromptSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
