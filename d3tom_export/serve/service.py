"""What an application answers with: a bundle, how it is asked unless a request says otherwise, and who is let in."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.api.answers import Description
from d3tom_export.api.model import Model
from d3tom_export.api.opening import open
from d3tom_export.api.pictures import Pictures
from d3tom_export.api.settings import generation_changes
from d3tom_export.errors import D3tomError, printable
from d3tom_export.progress import Note, Progress
from d3tom_export.serve.answering import Answering
from d3tom_export.serve.failures import RequestError, busy, of_library
from d3tom_export.serve.lengths import length_settings
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.metrics import Metrics
from d3tom_export.serve.requests import Chat, read_chat

_MOST_TOKENS = 1024
_SEEDS = 1 << 31
_STEPS = ("steps", "step_ratio")
_RULES = ("threshold", "factor", "margin", "max_steps", "remasking")
"""Settings that belong to one commit rule, or to plans."""


@dataclass(frozen=True)
class Prepared:
    """A request that was read, found to be one that can be answered, and whose pictures are cut."""

    chat: Chat
    pictures: Pictures
    settings: dict[str, Any]
    """All of the answer's."""


class Service:
    """A bundle's models and the requests that they have. Places are taken and freed in the event loop's thread.

    Args:
        bundle: The folder.
        limits: Of requests.
        name: What clients call the model; None: the checkpoint's name.
        models: How often the bundle is opened.
        settings: Of answers, where requests have none: those of the library.
        opening: How the bundle is opened, as :func:`d3tom_export.open` takes it.
        note: Called with sentences for the user, while models are opened.
        progress: Called while the first model's stages load.
        opened: Called, in a thread, when the first model is open.
        failed: Called with the error of a model that could not be opened.

    Raises :class:`D3tomError` for no bundle, and for settings that cannot be.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        limits: Limits,
        name: str | None,
        models: int,
        settings: Mapping[str, Any],
        opening: Mapping[str, Any],
        note: Note,
        progress: Progress,
        opened: Callable[[Description], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.limits, self._settings = limits, dict(settings)
        self._quiet = False

        def notes(sentence: str) -> None:
            if not self._quiet:  # what is said of clients' pictures is not for the server's user
                note(sentence)

        def open_one(**how: Any) -> Model:
            return open(bundle, load=False, note=notes, **{**opening, **how})

        self._front = open_one(progress=progress)
        """Reads and checks requests; the first model's thread loads it."""
        self._front.check(0, "?", **self._settings)
        self.fingerprint = self._front.fingerprint()["model"]
        fronts, choosing = [self._front], threading.Lock()

        def opener() -> Model:
            with choosing:
                front = fronts.pop() if fronts else None
            return open_one() if front is None else front

        self.model = "" if name is None else name
        """Known once a model is open."""
        self._described: Description | None = None
        self._when_open = opened
        self.answering = Answering(
            opener,
            models=models,
            batch=limits.batch,
            waited=lambda seconds: self.metrics.waited.observe(seconds),
            opened=self._opened,
            failed=failed,
        )
        self.metrics = Metrics(
            lambda: self.answering.waiting, lambda: self.answering.running, lambda: self.answering.open
        )
        self.created = int(time.time())
        self._places = limits.queue + models
        self._taken, self._models = 0, models
        self.stopping = False
        self.abandoned = False
        """Whether nobody waits for the models to end."""

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, but for want of a place."""
        return self.answering.open > 0 and not self.stopping

    @property
    def described(self) -> Description:
        """What answers, once a model is open."""
        assert self._described is not None
        return self._described

    @property
    def most_tokens(self) -> int:
        """The longest answer that may be asked for."""
        if self.limits.tokens is not None:
            return self.limits.tokens
        return max(_MOST_TOKENS, self._length)

    @property
    def _length(self) -> int:
        """G of answers whose requests do not say."""
        return self.described.generation.changed(**generation_changes(self._settings)).gen_length

    def take_place(self) -> Callable[[], None]:
        """Take one; what is returned frees it, once. Raises :class:`RequestError` where there is none."""
        if self._taken >= self._places:
            raise busy(self.answering.seconds * max(1, self.answering.waiting) / self._models)
        self._taken += 1
        held = True

        def free() -> None:
            nonlocal held
            if held:
                held = False
                self._taken -= 1

        return free

    def prepare(self, body: bytes, between: Callable[[], None] = lambda: None) -> Prepared:
        """Read a request, in any thread. Raises :class:`RequestError` for one that cannot be answered.

        ``between`` is called before each picture is decoded, and may end it by an error of its own.
        """
        chat = read_chat(body, self.limits)
        if chat.model != self.model:
            raise RequestError(
                404,
                f"There is no model {printable(chat.model, 120)!r} here; this server has {self.model!r}.",
                code="model_not_found",
                param="model",
            )
        settings = self._settings_of(chat)
        try:
            self._front.check(len(chat.pictures), chat.question, **settings)
            pictures = self._front._see(tuple(chat.pictures), between)
            chat.pictures.clear()  # their files are not needed any more, and the request may wait for long
            self._front.check(pictures, chat.question, **settings)
        except D3tomError as error:
            raise of_library(error) from None
        return Prepared(chat, pictures, settings)

    def _settings_of(self, chat: Chat) -> dict[str, Any]:
        given, base = chat.settings, dict(self._settings)
        if "commit" in given:  # what belongs to a rule is no other rule's
            base = _without(base, _RULES)
        if not given.keys().isdisjoint(_STEPS):
            base = _without(base, _STEPS)
        if chat.question[0]["role"] == "system":
            base.pop("system", None)
        settings = {**base, **given}
        settings.setdefault("seed", secrets.randbelow(_SEEDS))
        most = chat.max_tokens
        if most is None:
            if self._length <= self.most_tokens:
                return settings
            most = self.most_tokens
        if most > self.most_tokens:
            raise RequestError(
                400,
                f"max_tokens is {most:,}; answers of this server have {self.most_tokens:,} at most.",
                code="max_tokens_too_large",
                param="max_tokens",
            )
        if not given.keys().isdisjoint(("block_length", *_STEPS)):
            return {**settings, "gen_length": most}  # a plan of the client's own
        try:
            way = self.described.generation.changed(**generation_changes(settings))
        except D3tomError as error:
            raise of_library(error) from None
        return _without(settings, _STEPS) | length_settings(way, most)

    def _opened(self, described: Description) -> None:
        first, self._described, self._quiet = self._described is None, described, True
        self.model = self.model or described.model
        self.metrics.opened(described)
        if first:
            self._when_open(described)


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
