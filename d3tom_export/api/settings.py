"""What one answer may be asked otherwise than its bundle was built for, by the names of ``run``'s options."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from d3tom_export.config import (
    CommitRule,
    Deciders,
    GenerationConfig,
    Loop,
    MergeAt,
    MergeConfig,
    MergeSchedule,
    Remasking,
    Remerge,
    StepSchedule,
)
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.trust.fields import shown

if TYPE_CHECKING:
    from d3tom_export.bundle.manifest import Manifest
    from d3tom_export.pipeline import Reader
    from d3tom_export.prompt.conversation import Conversation, Turn

    Question = str | Sequence[Turn] | Sequence[Mapping[str, Any]]
    """What is asked: a question, or a conversation that ends with one, of turns or of messages
    ``{"role": "system", "user" or "assistant", "content": ...}`` as OpenAI's chat API has them."""

MOST_STOPS = 64
"""Texts that end an answer."""


class LoopSettings(TypedDict, total=False):
    """How an answer is denoised, as keywords: they mean what ``d3tom-export run --help`` says of these options."""

    gen_length: int
    """G, answer tokens."""
    block_length: int
    steps: int
    """Of the whole answer."""
    step_ratio: float
    step_schedule: StepSchedule
    shift: float
    commit: CommitRule
    threshold: float
    factor: float
    margin: float
    max_steps: int
    fill_after_end: bool
    remasking: Remasking
    temperature: float
    top_k: int
    """0 for all."""
    top_p: float
    seed: int


class Settings(LoopSettings, total=False):
    """Settings of one answer, as keywords. What is not given is as the bundle was built (``Model.describe``).

    They mean what ``d3tom-export run --help`` says of the options of these names; docs/api.md has them in a table.
    """

    ratio: float
    """Share of the visual tokens merged away, in [0, 1)."""
    schedule: MergeSchedule
    """The ratio over the steps: "adaptive", "fixed", or "none", which merges nothing."""
    deciders: Deciders
    remerge: Remerge
    cached_adaptive: bool
    merge_at: MergeAt
    keep_multiple: int
    early_exit: bool
    """Whether the answer ends where its text is settled: True unless ``raw_text`` is."""
    system: str | None
    """What the system turn says; None leaves the turn out."""
    stop: str | Sequence[str]
    """Texts that end the answer while it is made, at most 64, in place of the model's own."""
    suffix: str
    """Text that stands behind the answer from the first step on."""
    raw_text: bool
    """Whether the text is that of all ids, as the release prints it."""
    share_prefix: bool
    """Whether the prompt is prefilled up to the end of its last picture by itself, and once for all questions about it:
    with a KV cache, of bundles that were built for it."""


GENERATION = {
    **{name: name for name in ("gen_length", "block_length", "steps", "step_ratio")},
    "step_schedule": "schedule",
    **{name: name for name in ("shift", "remasking", "temperature", "top_k", "top_p", "commit", "threshold", "factor")},
    **{name: name for name in ("margin", "max_steps", "fill_after_end", "seed")},
}
"""Settings that concern the loop, and the fields of :class:`~d3tom_export.config.GenerationConfig` that they set."""

SETTINGS = tuple(Settings.__annotations__)
"""Their names."""

OPENING = (
    "backend", "device", "kv_cache", "precision", "verify", "provider_cache", "cuda_graphs", "specialization",
)  # fmt: skip
"""What says how a bundle is opened: arguments of :func:`d3tom_export.open` that commands and servers take."""

_SWITCHES = ("cached_adaptive", "fill_after_end", "early_exit", "raw_text", "share_prefix")

MERGE = ("ratio", "schedule", "deciders", "merge_at", "keep_multiple")
"""Settings that are fields of :class:`~d3tom_export.config.MergeConfig`."""
CACHE = {"remerge": "remerge", "cached_adaptive": "adaptive"}
"""Those that concern its loop with a KV cache, and the fields of :class:`~d3tom_export.config.CacheMergeConfig`."""


@dataclass(frozen=True)
class Asked:
    """All that one answer is made with, beside its picture and its question."""

    reader: Reader
    generation: GenerationConfig
    merge: MergeConfig
    share_prefix: bool
    raw_text: bool


def check_names(given: Mapping[str, Any], known: Collection[str] = SETTINGS) -> None:
    """Raise :class:`TypeError` for a keyword that is no setting, as Python does for one that a function lacks."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{name!r} is no setting of an answer{meant}")


def _check_kinds(given: Mapping[str, Any], stops: Sequence[str]) -> None:
    """Refuse switches and texts that are none; numbers and choices are checked where they are kept."""
    for name in _SWITCHES:
        if not isinstance(given.get(name, False), bool):
            raise D3tomError(f"{name} is {shown(given[name])}, expected True or False.")
    texts = [("stop", text) for text in stops] + [(name, given[name]) for name in ("system", "suffix") if name in given]
    for name, text in texts:
        if not isinstance(text, str) and not (name == "system" and text is None):
            raise D3tomError(f"{name} is {shown(text)}, expected a text.")


def generation_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`GenerationConfig` that the settings ``given`` change; others than its are passed over."""
    changes = {field: given[name] for name, field in GENERATION.items() if name in given}
    return changes | ({"top_k": None} if changes.get("top_k") == 0 else {})


def merge_with(base: MergeConfig, given: Mapping[str, Any]) -> MergeConfig:
    """``base`` with what the settings ``given`` change of it."""
    cache = replace(base.cache, **{field: given[name] for name, field in CACHE.items() if name in given})
    return replace(base, cache=cache, **{name: given[name] for name in MERGE if name in given})


def conversation_of(question: Question) -> str | Conversation:
    """``question`` as the library has it. Raises :class:`D3tomError` where it is neither a text nor a conversation."""
    from d3tom_export.prompt.conversation import Turn, parse_conversation

    if isinstance(question, str):
        return question
    if not isinstance(question, Sequence):
        raise D3tomError(f"{shown(question)} was given for a question, expected a text or a list of messages.")
    messages = [{"role": each.role, "content": each.content} if isinstance(each, Turn) else each for each in question]
    try:
        return parse_conversation(messages)
    except ValueError as error:
        raise D3tomError(
            f"The messages are no conversation: {error}. Expected a system turn or none, then user and assistant in "
            "turns, the last of them the user's."
        ) from None


def resolve(
    manifest: Manifest, reader: Reader, loop: Loop, question: str | Conversation, given: Mapping[str, Any]
) -> Asked:
    """What ``question`` is answered with, of a bundle's ``loop``.

    Raises :class:`D3tomError` for values that cannot be, and for those that the bundle was not built for;
    :class:`TypeError` for names that are no setting.
    """
    check_names(given)
    stops = given.get("stop", ())
    if not isinstance(stops, Iterable) or isinstance(stops, bytes):
        raise D3tomError(f"stop is {shown(stops)}, expected a text or a list of texts.")
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    _check_kinds(given, stops)
    generation = manifest.generation.changed(**generation_changes(given))
    if given.get("merge_at") == "prefill":
        manifest.merge.check_built_for_prefill()
    merge = merge_with(manifest.merge, given)
    share_prefix, raw_text = bool(given.get("share_prefix")), bool(given.get("raw_text"))
    if share_prefix:
        manifest.check_shares_prefix()
        if loop != "cached":
            raise CallError("--share-prefix concerns the loop with a KV cache; add --kv-cache.")
    if "system" in given:
        if not isinstance(question, str) and question[0].role == "system":
            raise CallError("The conversation has a system turn of its own; leave system out, or that turn.")
        reader = replace(reader, prompt=replace(reader.prompt, system=given["system"]))
    if len(stops) > MOST_STOPS:
        raise CallError(f"{len(stops)} stop texts were given, at most {MOST_STOPS} are looked for.")
    generation = replace(generation, end_ids=reader.end_ids)
    if stops:
        generation = replace(generation, stop_ids=reader.stop_ids(stops))
    if "suffix" in given:
        generation = replace(generation, suffix_ids=reader.suffix_ids(given["suffix"]))
    if raw_text and given.get("early_exit"):
        raise CallError("--raw-text is of all tokens as the release makes them; --early-exit leaves some out.")
    generation = replace(generation, early_exit=bool(given.get("early_exit", not raw_text)))
    return Asked(reader, generation, merge, share_prefix, raw_text)
