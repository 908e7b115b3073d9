"""Chat templates of strangers, rendered in a process of its own: no time, memory or text that they ask for is endless.

A template is a program. jinja2's sandbox keeps it from everything but its variables, and limits each of its loops but
not loops within loops, nor a text's growth; so a child process renders, with limits on its processor time and memory,
and is given up after a while. The environment is transformers': blocks lose the line break and the blanks around them,
and ``raise_exception``, ``strftime_now`` and ``tojson`` are there. Imports no framework, and jinja2 in the child alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LONGEST_TEMPLATE = 1 << 18
"""Characters. The longest that are published have some 20,000."""

_LONGEST_TEXT = 1 << 16
"""Characters of what a conversation becomes: that of a few words."""

_SECONDS = 5
"""Processor time of all conversations together; a real template takes milliseconds."""

_PATIENCE = 60
"""Seconds that a busy machine may take for that."""

_MEMORY = 1 << 29
"""Bytes of the child's address space."""

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import render; render()"


class Rendered(NamedTuple):
    """What a template makes of conversations."""

    texts: list[str | None]
    """One for each; None where the template refuses it."""
    reasons: list[str]
    """Why it does, in the template's or jinja2's words."""
    dated: bool
    """Whether the template asked for the date."""


def rendered(
    template: str, variables: Mapping[str, str], conversations: Sequence[Sequence[Mapping[str, str]]]
) -> Rendered:
    """``template`` for each of ``conversations``, with a place for the answer to come.

    ``variables`` are the tokenizer's tokens by name ("bos_token" and so on). Raises ``ValueError`` with what is wrong
    where nothing at all comes of it: in words that can stand in a message.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"it has {len(template):,} characters, at most {LONGEST_TEMPLATE:,} are read")
    request = {"template": template, "variables": dict(variables), "conversations": conversations}
    # The child finds modules where this process does, and not in the folder that it happens to run in.
    code, paths = _CHILD.format(module=__name__), json.dumps([path for path in sys.path if path])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, paths, str(_SECONDS)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it was not rendered after {_PATIENCE} s") from None
    if done.returncode != 0:
        if b"No module named 'jinja2'" in done.stderr:
            raise ValueError("jinja2, which renders it, is not installed")
        raise ValueError(
            f"rendering it took more than {_SECONDS} s of processor time or {_MEMORY >> 20} MiB of memory, or failed "
            f"otherwise (exit code {done.returncode})"
        )
    answer = json.loads(done.stdout)
    return Rendered(answer["texts"], answer["reasons"], answer["dated"])


def render() -> None:
    """In the child: the request from standard input, its answer to standard output."""
    import resource

    seconds = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    request = json.load(sys.stdin)
    json.dump(_render(**request), sys.stdout)


def _render(template: str, variables: dict[str, str], conversations: list[list[dict[str, str]]]) -> dict[str, Any]:
    import datetime

    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    dated = False

    def raise_exception(message: object) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        nonlocal dated
        dated = True
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    texts: list[str | None] = []
    reasons: list[str] = []
    try:
        compiled = environment.from_string(template)
    except Exception as error:
        return {"texts": [None] * len(conversations), "reasons": [_reason(error)], "dated": False}
    for messages in conversations:
        pieces, length = [], 0
        try:
            for piece in compiled.generate(messages=messages, add_generation_prompt=True, **variables):
                length += len(piece)
                if length > _LONGEST_TEXT:
                    raise ValueError(f"it makes more than {_LONGEST_TEXT:,} characters of a few words")
                pieces.append(piece)
            texts.append("".join(pieces))
        except Exception as error:  # a stranger's program may fail in any way
            texts.append(None)
            reasons.append(_reason(error))
    return {"texts": texts, "reasons": reasons, "dated": dated}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
