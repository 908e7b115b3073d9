"""What a server takes of a request, and how many at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from d3tom_export.errors import CallError

SENDING = 4.0
"""Seconds beyond a request's own that its client may take to read the response; then the connection is cut."""

PICTURES = 4
"""How many of the largest pictures a request's may be together: decoding takes time."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server. Raises :class:`CallError` for those that let nothing through."""

    queue: int = 64
    """Requests that wait while others are answered; a further one gets 429."""
    seconds: float = 300.0
    """From a request's headers to the end of its answer; what is sent has :data:`SENDING` more to be taken."""
    body_bytes: int = 32 << 20
    """Of a request's body, its pictures in base64 included."""
    pictures: int = 16
    """Of a request."""
    pixels: int = 50_000_000
    """Of a picture. Decoding takes 8 bytes each, for two requests at a time. A request's pictures have
    :data:`PICTURES` times as many together."""
    tokens: int | None = None
    """Of an answer, G at most; None: 1,024, or the bundle's own length where that is more."""
    batch: int = 1
    """Answers at once, of those that are not streamed."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "queue" else 1
            if value is not None and not value >= least:
                raise CallError(f"A server with a limit of {value} for {field.name} cannot be; give {least} or more.")
