"""A checkpoint's own chat template, cut up once into a :class:`Template`: a run needs no template engine.

It is rendered for conversations of known words (:mod:`d3tom_export.prompt.rendering`), the text between those words is
what the template adds, and other conversations, put together from that, must come out as the template renders them. A
template that does more than to stand between what is said, or cannot be rendered, gives way to the family's. Imports
no framework; for building alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.errors import D3tomError, printable
from d3tom_export.families.family import ROLES, Role, Template
from d3tom_export.families.registry import family_of
from d3tom_export.progress import Note, no_note
from d3tom_export.prompt.conversation import IMAGE_PLACEHOLDER, Conversation, Turn, joined
from d3tom_export.prompt.rendering import LONGEST_TEMPLATE, rendered
from d3tom_export.prompt.settings import PromptSettings
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import find_inside, is_there, read_bytes

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE_FILE, _TEMPLATE_DOCUMENT = "chat_template.jinja", "chat_template.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_LONGEST_TOKEN = 1000
"""Characters of a special token's text."""


def prompt_settings(
    checkpoint: Checkpoint, *, drop_token_after_image: bool = True, note: Note = no_note
) -> PromptSettings:
    """How ``checkpoint`` is asked: by its own chat template and beginning-of-text token, else as its family is.

    ``note`` is told where a template is there and could not be taken. Raises :class:`D3tomError` where a file of the
    checkpoint cannot be read.
    """
    family = family_of(checkpoint.config)
    settings = PromptSettings.of_family(family, drop_token_after_image=drop_token_after_image)
    said = _tokenizer_config(checkpoint.folder)
    tokens = _special_tokens(said, checkpoint.folder)
    if "bos_token" in said:
        settings = replace(settings, bos=tokens.get("bos_token"))
    elif family.bos:
        tokens["bos_token"] = family.bos
    try:
        source = _own_template(checkpoint.folder, said)
        if source is None:
            return settings
        template, dated = split_template(source, tokens)
    except ValueError as error:
        note(
            f"{checkpoint.folder} has a chat template that cannot be taken over: {printable(str(error), 300)}. "
            f"{family.title}'s own is used in its place."
        )
        return settings
    if dated:
        note(f"The chat template of {checkpoint.folder} says the date; the bundle will always say today's.")
    if template.before_system is None and settings.system is not None:
        note(
            f"The chat template of {checkpoint.folder} has no place for a system text, so {family.title}'s is left out."
        )
        settings = replace(settings, system=None)
    return replace(settings, template=template)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    return read_json(find_inside(folder, _TOKENIZER_CONFIG)) if is_there(folder, _TOKENIZER_CONFIG) else {}


def _special_tokens(said: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Texts of the special tokens that a tokenizer_config.json names."""
    tokens = {}
    for name in _TOKENS:
        value = said.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_TOKEN:
            raise D3tomError(
                f"{folder / _TOKENIZER_CONFIG} has {name} {shown(said[name])}, expected a token's text. Fetch the file "
                "again or correct it."
            )
        tokens[name] = value
    return tokens


def _own_template(folder: Path, said: Mapping[str, Any]) -> str | None:
    """A checkpoint's chat template, from where transformers looks for it first; of several the one called "default"."""
    if is_there(folder, _TEMPLATE_FILE):
        content = read_bytes(find_inside(folder, _TEMPLATE_FILE), 4 * LONGEST_TEMPLATE)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{_TEMPLATE_FILE} is not UTF-8 ({error.reason} at byte {error.start})") from None
    found = said.get("chat_template")
    if found is None and is_there(folder, _TEMPLATE_DOCUMENT):
        found = read_json(find_inside(folder, _TEMPLATE_DOCUMENT)).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
        if found is None:
            raise ValueError("there are several and none is called default")
    if found is None or isinstance(found, str):
        return found
    raise ValueError(f"it is {shown(found)}, expected a text")


# Words that no template says, with blanks around them that it may take away, one for each turn.
_WORDS = tuple(f"d3tom-turn-{number}-0f4b" for number in "abcd")
_USER, _ASSISTANT, _USER_AGAIN, _SYSTEM = (f" \n{word}\t " for word in _WORDS)

_ODD = "\n 1 <b> & \"two\"\\ 'three'  {{ four }} é\n\nfive "
"""What the parts are tried with: whatever else a template does to a text shows on one of these."""


def split_template(source: str, tokens: Mapping[str, str]) -> tuple[Template, bool]:
    """The parts of a jinja template, and whether it says the date. ``tokens`` are the tokenizer's, by name.

    What a template refuses is left out: a system turn, or turns behind an answer. Raises ``ValueError``, in words that
    can stand in a message, where it cannot be rendered, or does what no :class:`Template` says.
    """
    one, system = (Turn("user", _USER),), Turn("system", _SYSTEM)
    several = (*one, Turn("assistant", _ASSISTANT), Turn("user", _USER_AGAIN))
    asks, answers = Turn("user", f"{_ODD}?"), Turn("assistant", f"{_ODD}.\n")
    odd = (asks, answers, Turn("user", " "), answers)
    tried: list[Conversation] = [(asks,), (*odd, asks), (*odd, *odd, asks)]
    tried += [(Turn("system", f" {_ODD}"), *turns) for turns in tried]
    asked: list[Conversation] = [one, several, (system, *one), *tried]
    texts, reasons, dated = rendered(source, tokens, [[asdict(turn) for turn in turns] for turns in asked])
    if texts[0] is None:
        raise ValueError(reasons[0])
    strips: set[Role] = set()
    start, to_answer = _between(texts[0], one, strips)
    # A template that passes over a turn, or refuses it, has no place for one.
    before = after = to_assistant = to_user = None
    if texts[1] is not None and _WORDS[1] in texts[1]:
        first, to_assistant, to_user, last = _between(texts[1], several, strips)
        if (first, last) != (start, to_answer):
            raise ValueError("what it says around a first question depends on what follows")
    if texts[2] is not None and _WORDS[3] in texts[2]:
        before, after, last = _between(texts[2], (system, *one), strips)
        if last != to_answer:
            raise ValueError("what it says behind a question depends on the system text")
    template = Template(
        start=start,
        before_system=before,
        after_system=after,
        to_assistant=to_answer if to_assistant is None else to_assistant,
        to_user=to_user,
        to_answer=None if to_assistant in (None, to_answer) else to_answer,
        strips=tuple(role for role in ROLES if role in strips),
    )
    if any(IMAGE_PLACEHOLDER in part for part in asdict(template).values() if isinstance(part, str)):
        raise ValueError(f"it says {IMAGE_PLACEHOLDER} itself, which stands for a picture that is given")
    for turns, text in zip(tried, texts[3:], strict=True):
        sayable = (before is not None or turns[0].role != "system") and (to_user is not None or len(turns) <= 2)
        if sayable and (text is None or joined(template, turns) != text):
            raise ValueError("it does more with what is said than to stand between it")
    return template, dated


def _between(text: str, turns: Conversation, strips: set[Role]) -> list[str]:
    """The text around what each of ``turns`` says; adds to ``strips`` who loses the blanks around it."""
    pieces = []
    for turn in turns:
        word = turn.content.strip()
        if text.count(word) != 1:
            raise ValueError(f"it says what the {turn.role} says {text.count(word)} times")
        whole = turn.content in text
        before, _, text = text.partition(turn.content if whole else word)
        if not whole:
            strips.add(turn.role)
        pieces.append(before)
    return [*pieces, text]
