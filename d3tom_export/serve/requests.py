"""A chat request to what a model is asked: OpenAI's fields, checked, and none of them passed over silently."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from d3tom_export.errors import D3tomError, printable
from d3tom_export.families.family import ROLES
from d3tom_export.prompt.conversation import IMAGE_PLACEHOLDER
from d3tom_export.serve.failures import RequestError
from d3tom_export.serve.limits import PICTURES, Limits
from d3tom_export.serve.stops import StopTexts
from d3tom_export.trust.data_uris import base64_of, decoded
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.images import opened_picture

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells beside the text."""

    include_usage: bool | None = None


class Fields(msgspec.Struct, frozen=True):
    """The fields that are heeded, as OpenAI's API has them, and one of our own."""

    model: str
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=4096)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    d3tom: dict[str, Any] | None = None


_IGNORED = {
    *("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"),
    "reasoning_effort",
}
"""Fields that concern whoever keeps accounts, or models that reason before they answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "parallel_tool_calls": (True, False),
}
"""Fields that are not heeded, and the values with which they ask for nothing."""

KNOBS = (
    *("ratio", "schedule", "deciders", "remerge", "cached_adaptive", "merge_at", "keep_multiple"),
    *("block_length", "steps", "step_ratio", "step_schedule", "shift"),
    *("commit", "threshold", "factor", "margin", "max_steps", "fill_after_end", "remasking", "top_k"),
)
"""Settings of an answer that a request may change in its field ``d3tom``, by the library's names."""

_MOST_STOPS = 16
_LONGEST_STOP = 256
"""Characters. OpenAI's own have 4 stops of a few tokens."""
_MOST_ELEMENTS = 200_000
"""Commas and brackets of a body. JSON of empty lists takes thirty times its size, and a text has fewer by far."""


@dataclass(frozen=True)
class Chat:
    """What a request asks."""

    model: str
    question: list[dict[str, str]]
    """Messages as the library takes them; ``<image>`` where a picture is shown."""
    pictures: list[bytes]
    """In the order of their places: what is in a picture's file; none once they are cut."""
    settings: dict[str, Any]
    """Of the answer, but for its length: those of the library."""
    max_tokens: int | None
    stops: StopTexts
    stream: bool
    include_usage: bool
    drafts: bool
    """Whether a stream tells every step."""


def read_chat(body: bytes, limits: Limits) -> Chat:
    """The request in ``body``. Raises :class:`RequestError`; pictures are not decoded, but their headers looked at."""
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MOST_ELEMENTS:
        raise RequestError(400, f"The body has more than {_MOST_ELEMENTS:,} elements (commas and brackets). Say less.")
    try:
        raw = parse_json(body)
    except ValueError as error:
        raise RequestError(400, f"The body cannot be read as JSON: {error}.") from None
    given = {name: value for name, value in raw.items() if value is not None}
    _refuse_others(given)
    fields = _fields(given)
    if fields.max_tokens is not None and fields.max_completion_tokens not in (None, fields.max_tokens):
        raise RequestError(400, "max_tokens and max_completion_tokens say the same; give one.", param="max_tokens")
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stops) > _MOST_STOPS or not all(stops):
        raise RequestError(400, f"stop takes up to {_MOST_STOPS} texts, none of them empty.", param="stop")
    if any(len(stop) > _LONGEST_STOP for stop in stops):
        raise RequestError(400, f"A stop text has {_LONGEST_STOP} characters at most.", param="stop")
    knobs = dict(fields.d3tom or {})
    drafts = knobs.pop("drafts", False)
    for name in knobs:
        if name not in KNOBS:
            where = f"d3tom.{printable(name, 80)}"
            raise RequestError(
                400, f"{where} is no setting of an answer here: drafts, {', '.join(KNOBS)}.", param=where
            )
    if not isinstance(drafts, bool):
        raise RequestError(400, f"d3tom.drafts is {shown(drafts)}, expected true or false.", param="d3tom.drafts")
    settings = dict(knobs)
    if stops:
        settings["stop"] = stops
    for name in ("seed", "temperature", "top_p"):
        value = getattr(fields, name)
        if value is not None and not (name == "top_p" and value == 1):  # all of them: what every model does
            settings[name] = value
    messages = _Messages(limits)
    for number, message in enumerate(fields.messages):
        messages.add(message, f"messages[{number}]")
    return Chat(
        fields.model,
        messages.found,
        messages.pictures,
        settings,
        fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens,
        StopTexts(stops),
        bool(fields.stream),
        fields.stream_options is not None and bool(fields.stream_options.include_usage),
        drafts,
    )


def _refuse_others(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in Fields.__struct_fields__ or name in _IGNORED:
            continue
        if name not in _NEUTRAL:
            raise RequestError(
                400,
                f"{printable(name, 80)} is no field that this server knows. Leave it out.",
                code="unknown_parameter",
                param=printable(name, 80),
            )
        if not any(value == neutral for neutral in _NEUTRAL[name]):
            raise RequestError(
                400,
                f"{name} {shown(value)} cannot be done here: one answer, in text. Leave {name} out.",
                code="unsupported_parameter",
                param=name,
            )


def _fields(given: Mapping[str, Any]) -> Fields:
    try:
        return msgspec.convert(given, Fields)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        where = printable(place.rstrip("`").lstrip("."), 120)
        message = f"{where or 'The request'}: {printable(what.replace('`', ''), 300)}."
        raise RequestError(400, message, param=where or None) from None


class _Messages:
    """Messages as the library takes them, and the pictures in them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.found: list[dict[str, str]] = []
        self.pictures: list[bytes] = []
        self._pixels = 0

    def add(self, message: dict[str, Any], where: str) -> None:
        for name, value in message.items():
            # Clients give an answer back as they got it: with fields that say nothing.
            if name not in ("role", "content", "name") and value not in (None, []):
                raise RequestError(400, f"{where} has {printable(name, 80)}, which cannot be done here.", param=where)
        role = message.get("role")
        if role == "developer":  # what OpenAI calls the system's later on
            role = "system"
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(
                400, f"{where} has role {shown(role)}, expected {', '.join(ROLES)}.", param=f"{where}.role"
            )
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or len(parts) > 4096:
            expected = "expected a text or a list of parts"
            raise RequestError(400, f"{where} has content {shown(content)}, {expected}.", param=f"{where}.content")
        before = len(self.pictures)
        texts = [self._part(part, role, f"{where}.content[{number}]") for number, part in enumerate(parts)]
        text, shown_here = "".join(texts), len(self.pictures) - before
        placed = text.count(IMAGE_PLACEHOLDER)
        if placed not in (0, shown_here):
            raise RequestError(
                400,
                f"{where} places {placed} pictures with {IMAGE_PLACEHOLDER} and brings {shown_here}. Place each, or "
                "none: then they come first.",
                param=f"{where}.content",
            )
        self.found.append({"role": role, "content": text if placed else f"{IMAGE_PLACEHOLDER}\n" * shown_here + text})

    def _part(self, part: Any, role: str, where: str) -> str:
        """A part's text; a picture is put with the others."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            return part["text"]
        if kind != "image_url":
            raise RequestError(
                400, f"{where} is {shown(part)}, expected a part of type text or image_url.", param=where
            )
        if role != "user":
            raise RequestError(400, f"{where} is a picture, and the {role} shows none. Move it to a user message.")
        if len(self.pictures) >= self._limits.pictures:
            raise RequestError(400, f"The request has more than {self._limits.pictures} pictures.", param="messages")
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else None
        if not isinstance(url, str):
            raise RequestError(400, f'{where} has no text image_url: {{"url": ...}}.', param=where)
        picture = _picture(url, where)
        most = self._limits.pixels
        self._pixels += _checked_pixels(picture, f"picture {len(self.pictures) + 1} of the prompt", most, where)
        if self._pixels > PICTURES * most:
            raise RequestError(
                400,
                f"The request's pictures have more than the {PICTURES * most:,} pixels that this server decodes for "
                "one request. Scale them down; no model sees more than a few megapixels of each.",
                code="image_too_large",
                param=where,
            )
        self.pictures.append(picture)
        return ""


def _picture(url: str, where: str) -> bytes:
    """What is in a data URI. Nothing is ever fetched: a server inside a network would fetch for those outside it."""
    data = base64_of(url)
    if data is None:
        raise RequestError(
            400,
            f"{where} has the picture {shown(url[:60])}. This server fetches nothing: send the picture itself, as "
            "data:image/png;base64,... (PNG, JPEG, WebP, BMP, GIF, TIFF or PPM).",
            code="invalid_image_url",
            param=where,
        )
    try:
        return decoded(data)
    except ValueError as error:
        raise RequestError(400, f"{where} {error}.", code="invalid_base64", param=where) from None


def _checked_pixels(picture: bytes, name: str, most: int, where: str) -> int:
    """How many ``picture`` has."""
    try:
        with opened_picture(io.BytesIO(picture), name) as header:
            width, height = header.size
    except D3tomError as error:
        raise RequestError(400, str(error), code="invalid_image", param=where) from None
    if width * height > most:
        raise RequestError(
            400,
            f"{name} is {width:,} x {height:,} pixels, more than the {most:,} that this server decodes. Scale it down; "
            "no model sees more than a few megapixels of it.",
            code="image_too_large",
            param=where,
        )
    return width * height
