"""What a client is told that gets no answer, in the shape that OpenAI's API gives its errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from d3tom_export.errors import D3tomError, SizeError, printable

_FIELDS = {
    "gen-length": "max_tokens",
    "image": "an image_url part",
    "prompt": "a user message",
    "prompt-file": "messages",
    "system": "a system message",
    **{name: name.replace("-", "_") for name in ("stop", "temperature", "top-p", "seed")},
}
"""Options of the command line, as the library's paragraphs name them, and where a request says the same."""


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: One paragraph: what was refused, what is expected.
        code: A word for programs, by which OpenAI's API tells errors of one status apart.
        param: The field of the request that is to blame.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(printable(message))
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        error = {"message": str(self), "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}


def _kind(status: int) -> str:
    if status == HTTPStatus.UNAUTHORIZED:
        return "authentication_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"


def of_library(error: D3tomError) -> RequestError:
    """What the library refuses, which is about what was asked, in the request's words for its options."""

    def field(match: re.Match[str]) -> str:
        name = match[1]
        return _FIELDS.get(name, f"d3tom.{name.replace('-', '_')}")

    return RequestError(400, re.sub(r"--([a-z][a-z-]*[a-z])", field, str(error)))


def of_model(error: Exception) -> RequestError:
    """Why a request that was accepted has no answer: seldom for what it asked, so its status is the server's own."""
    if isinstance(error, SizeError):
        return of_library(error)
    if isinstance(error, D3tomError):
        return RequestError(
            500, "The model could not make this answer. The server's operator sees why.", code="model_failed"
        )
    return defect(error)


def busy(seconds: float) -> RequestError:
    """All places are taken; one may be free in so many seconds."""
    wait = min(max(round(seconds), 1), 60)
    return RequestError(
        429,
        f"The server has as many requests as it takes at once. Ask again in {wait} s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait)},
    )


def unavailable(why: str, seconds: int = 5) -> RequestError:
    """Nobody answers now; so many seconds later somebody may."""
    return RequestError(503, why, code="unavailable", headers={"Retry-After": str(seconds)})


def too_late(seconds: float) -> RequestError:
    """The request's time is over."""
    return RequestError(
        504,
        f"The answer was not ready within the {seconds:g} s that this server gives a request. Ask for a shorter answer "
        "(max_tokens) or for fewer steps, or later.",
        code="timeout",
    )


def defect(error: Exception) -> RequestError:
    """Something that no client can mend; the server's own output has more of it."""
    kind = type(error).__name__
    return RequestError(
        500, f"The answer stopped on an unexpected {kind}. The server's operator sees more.", code="defect"
    )
