"""What a family is: data and small functions that say everything particular to it.

A family is no model. The transformer, the vision tower and the loop are one for all of them
(:mod:`d3tom_export.model`, :mod:`d3tom_export.loop`); a family says how its checkpoints are recognised, how they spell
what those are made of, and how they are asked. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from d3tom_export.config import GenerationConfig

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Who speaks in a conversation, in the order of their first turns."""

Raw = Mapping[str, Any]
"""A ``config.json`` as it was read."""


def architectures(raw: Raw) -> tuple[str, ...]:
    """The names under ``architectures``, whatever a stranger's file has there."""
    named = raw.get("architectures")
    return tuple(name for name in named if isinstance(name, str)) if isinstance(named, list) else ()


@dataclass(frozen=True)
class LanguageKeys:
    """How a ``config.json`` says the language model."""

    keys: Mapping[str, str]
    """Our field to the file's key. Fields: d_model, n_layers, n_heads, n_kv_heads, mlp_hidden_size, vocab_size,
    embedding_size, mask_token_id, eos_token_id, rope_theta, rms_norm_eps, max_sequence_length, max_prompt_length,
    include_qkv_bias, multi_query_attention, banned_token_ids, tie_word_embeddings. One that is left out has none."""
    required: tuple[str, ...]
    """Our fields without a safe default: where the original's own default describes another model."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that select an architecture, with the values that are built."""
    said: tuple[str, ...] = ()
    """Those of ``fixed`` whose absence is another value to the original: they must be there."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Our fields that the original's code fixes, or falls back to where the file has no such key."""
    row_shift: bool = False
    """As in :class:`~d3tom_export.config.LanguageConfig`."""


@dataclass(frozen=True)
class VisionKeys:
    """How a ``config.json`` says the eyes, which are SigLIP's in every family so far."""

    towers: tuple[str, ...]
    """Names of towers of SigLIP-so400m's geometry at 384 pixels: a path that ends in one needs no ``vision_config``."""
    required: tuple[str, ...]
    """Keys whose absence means something else to the original."""
    fixed: Mapping[str, tuple[Any, ...]]
    pooled: bool
    aspect: str
    """``image_aspect_ratio`` as a pattern; its group, if it has one, is N of "anyres_max_N"."""
    pads_several: bool = False
    """As in :class:`~d3tom_export.config.VisionConfig`."""
    default_tower: str | None = None
    """The tower where the file names none that is known, as the original's own evaluation supplies it."""


@dataclass(frozen=True)
class Template:
    """A conversation up to the assistant's next answer, as the text between what the turns say.

    :func:`d3tom_export.prompt.conversation.joined` writes one out.
    """

    start: str
    """What comes before the first user turn, where nobody gives a system text."""
    before_system: str | None
    after_system: str | None
    """Around a system text; the first user turn follows. Both None: there can be no system turn."""
    to_assistant: str
    """Between what a user says and the answer to it."""
    to_user: str | None
    """Between an answer and what the user says next; None: there is only one question."""
    to_answer: str | None = None
    """Behind the last thing that the user says, where the answer to come is led up to in another way than those that
    were given; None: as ``to_assistant``."""
    strips: tuple[Role, ...] = ROLES
    """Whose texts lose the blanks around them."""


@dataclass(frozen=True)
class Family:
    """One family of models. The registry has them all (:mod:`d3tom_export.families.registry`)."""

    name: str
    title: str
    """As its authors spell it."""
    recognises: Callable[[Raw], bool]
    """Whether a ``config.json`` is one of its own."""
    language: LanguageKeys
    vision: VisionKeys | None
    stored_name: Callable[[str], str]
    """The name that its checkpoints have for a tensor, from the model's own (:mod:`d3tom_export.model`)."""
    template: Template
    system: str | None
    """What the system turn says unless told otherwise; None: there is none."""
    bos: str
    """The token that begins a text; the helper that joins text and pictures goes by it (lavida.md C3)."""
    end_tokens: tuple[str, ...]
    """Tokens that an answer is cut at when it is shown, beside the config's ``eos_token_id``."""
    generation: GenerationConfig
    """How its own evaluation answers."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer while it is made."""
    byte_level_bpe: str | None = None
    """The expression that cuts texts up before byte-level BPE, where checkpoints may come with ``vocab.json`` and
    ``merges.txt`` and no ``tokenizer.json`` (:mod:`d3tom_export.prompt.vocabulary`)."""
    geometries: Mapping[str, Raw] = field(default_factory=dict)
    """Sizes of its models by name, each as a ``config.json``."""
