"""Chat templates of checkpoints: cut up once into what stands between the turns, or given up for the family's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.errors import D3tomError
from d3tom_export.families import lavida_dream, lavida_llada, llada
from d3tom_export.families.family import Template
from d3tom_export.prompt import rendering
from d3tom_export.prompt.conversation import Turn, joined
from d3tom_export.prompt.settings import PromptSettings
from d3tom_export.prompt.template import prompt_settings, split_template

LLADA: str = json.loads((bundled_model() / "tokenizer_config.json").read_text())["chat_template"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2.5's: a system text of its own where nobody gives one, blanks and line breaks of blocks left out
WITH_DEFAULT = """{{ bos_token }}{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{% endif %}
    {%- for message in messages %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endfor %}
{{- '<|im_start|>assistant\n' }}"""
# The answer to come is led up to in another way, and only what a user says is stripped.
THINKING = (
    "{%- for m in messages -%}[{{ m.role }}]{{ m.content | trim if m.role == 'user' else m.content }}"
    "{%- endfor -%}[assistant]<think></think>"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system!') }}{% endif %}" + CHATML
IGNORED_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{% if loop.first %}{{ bos_token }}{% endif %}({{ m.content }})"
    "{% endfor %}>"
)
ONE_QUESTION = "{% if messages | length > 2 %}{{ raise_exception('one!') }}{% endif %}" + CHATML
WORKING = {
    "llada": LLADA,
    "chatml": CHATML,
    "default": WITH_DEFAULT,
    "thinking": THINKING,
    "no system": NO_SYSTEM,
    "ignored system": IGNORED_SYSTEM,
    "one question": ONE_QUESTION,
}
TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


@cache
def _split(name: str) -> Template:
    template, dated = split_template(WORKING[name], TOKENS)
    assert not dated
    return template


def test_the_released_templates_are_the_families() -> None:
    assert _split("llada") == llada.TEMPLATE
    assert _split("chatml") == lavida_dream.FAMILY.template


def test_what_a_template_has_no_place_for_is_left_out() -> None:
    for name in ("no system", "ignored system"):
        assert (_split(name).before_system, _split(name).after_system) == (None, None)
        assert _split(name).to_user is not None
    assert _split("one question").to_user is None
    assert _split("one question").before_system is not None
    assert _split("default").start.startswith("<|startoftext|><|im_start|>system\nYou are helpful.")
    assert _split("thinking").to_answer == "[assistant]<think></think>"
    assert _split("thinking").strips == ("user",)


SAID = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(name=st.sampled_from(sorted(WORKING)), system=st.none() | SAID, said=st.lists(SAID, min_size=1, max_size=5))
def test_what_is_put_together_is_what_jinja_renders(name: str, system: str | None, said: list[str]) -> None:
    template = _split(name)
    said = said[: 1 if template.to_user is None else len(said) - (len(said) + 1) % 2]
    system = None if template.before_system is None else system
    turns = (
        *(() if system is None else (Turn("system", system),)),
        *(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(said)),
    )
    (expected,), _ = render_jinja_template(
        [[asdict(turn) for turn in turns]], chat_template=WORKING[name], add_generation_prompt=True, **TOKENS
    )
    assert joined(template, turns) == expected


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if", "TemplateSyntaxError"),
        ("{{ raise_exception('never!') }}", "never!"),
        ("{{ messages.__class__.x }}", "SecurityError"),
        ("{% set x = messages.append(1) %}" + CHATML, "SecurityError"),
        ("{% include 'secret' %}", "TypeError|no loader"),
        ("nothing that is said", "says what the user says 0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "says what the user says 2 times"),
        ("{{ messages | tojson }}", "does more with what is said"),
        ("{{ messages | length }}" + CHATML, "depends on what follows"),
        ("{% for m in messages %}({{ m.content | upper }}){% endfor %}", "says what the user says 0 times"),
        ("{% for m in messages %}({{ m.content.lstrip() }}){% endfor %}", "does more with what is said"),
        ("{% for m in messages %}({{ m.content | e }}){% endfor %}", "does more with what is said"),
        ("{{ 'a' * 100000 }}" + CHATML, "makes more than 65,536 characters"),
        ("{{ 'a' * 10 ** 10 }}" + CHATML, "MemoryError"),
        ("<image>" + CHATML, "says <image> itself"),
        ("x" * 300_000, "has 300,000 characters"),
    ],
)
def test_what_does_more_or_fails_is_refused(source: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_template(source, TOKENS)


def test_a_template_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_SECONDS", 1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="took more than 1 s of processor time"):
        split_template(loop + CHATML, TOKENS)


def test_a_date_is_told_of() -> None:
    template, dated = split_template("{{ strftime_now('%Y') }}" + CHATML, TOKENS)
    assert dated
    assert template.start.endswith("<|im_start|>user\n")
    assert template.start[:4].isdigit()


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The synthetic checkpoint, to put a template beside."""
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in checkpoint_folder.iterdir():
        (copied / path.name).hardlink_to(path)
    return copied


def _settings(folder: Path, **said: Any) -> tuple[PromptSettings, list[str]]:
    notes: list[str] = []
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return prompt_settings(open_checkpoint(folder), note=notes.append), notes


FAMILYS = PromptSettings.of_family(lavida_llada.FAMILY)


def test_a_checkpoints_own_template_takes_the_familys_place(folder: Path) -> None:
    assert prompt_settings(open_checkpoint(folder)) == FAMILYS
    assert _settings(folder, bos_token="<|startoftext|>", chat_template=LLADA) == (FAMILYS, [])
    own = replace(FAMILYS, template=lavida_dream.FAMILY.template)
    assert _settings(folder, chat_template=CHATML) == (own, [])
    named = [{"name": "tool_use", "template": "{% if"}, {"name": "default", "template": CHATML}]
    assert _settings(folder, chat_template=named) == (own, [])
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert _settings(folder) == (own, [])
    (folder / "chat_template.jinja").write_text(LLADA)
    assert _settings(folder, chat_template=CHATML) == (FAMILYS, [])


def test_the_beginning_of_text_is_the_checkpoints(folder: Path) -> None:
    assert _settings(folder)[0].bos == "<|startoftext|>"
    assert _settings(folder, bos_token="<s>")[0].bos == "<s>"
    assert _settings(folder, bos_token={"content": "<s>", "lstrip": False})[0].bos == "<s>"
    assert _settings(folder, bos_token=None)[0].bos is None
    with pytest.raises(D3tomError, match="has bos_token 7, expected a token's text"):
        _settings(folder, bos_token=7)
    # The template says the one that the checkpoint has.
    assert _settings(folder, bos_token="<s>", chat_template=LLADA)[0].template.start.startswith("<s><|start_header")
    assert _settings(folder, chat_template=LLADA)[0] == FAMILYS


def test_what_cannot_be_taken_over_is_told_of(folder: Path) -> None:
    for template, says in (
        ("{% if", "TemplateSyntaxError"),
        (7, "it is 7, expected a text"),
        ([{"name": "a", "template": CHATML}, {"name": "b", "template": CHATML}], "none is called default"),
    ):
        settings, (note,) = _settings(folder, chat_template=template)
        assert settings == FAMILYS
        assert says in note
        assert "LaViDa-LLaDA's own is used in its place" in note
    settings, (note,) = _settings(folder, chat_template=NO_SYSTEM)
    assert settings.system is None
    assert "no place for a system text" in note
    _, (note,) = _settings(folder, chat_template="{{ strftime_now('%Y') }}" + CHATML)
    assert "says the date" in note
