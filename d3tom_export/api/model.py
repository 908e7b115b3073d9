"""A bundle that is open on a runtime: asked alone, step by step, or many requests at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

from d3tom_export.api.answers import Answer, Description, Request, Step
from d3tom_export.api.batches import Ready, RowRecords, answer_of, answer_together, batch_limit, grouped
from d3tom_export.api.pictures import Picture, Pictures, count_pictures, see
from d3tom_export.api.settings import Asked, Settings, conversation_of, resolve
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.errors import D3tomError, UnexpectedError
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.pictures.seen import SeenPictures
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.progress import Note
from d3tom_export.prompt.pieces import Said, said
from d3tom_export.trust.fields import shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from d3tom_export.api.settings import Question

_SHORT = 12
"""Characters of a hash that tell one from others."""
_WINDOW = 4
"""Batches' worth of requests that are held with their prompts' embeddings, to find those of equal layout among."""


class Model:
    """A bundle that is open; :func:`d3tom_export.open` makes one. A context, which closes it.

    From several threads: pictures are decoded side by side, and the runtime works for one answer at a time, whose
    steps another thread's :meth:`steps` may come between. Engines of TensorRT are bound to the thread that opened them:
    used in another, the model raises :class:`D3tomError`. Nothing is shared with other models, nor kept in the module.
    A process that was forked from one with an open model cannot use it.

    Every method but :meth:`close` raises :class:`D3tomError`, of one paragraph, for what cannot be done, and names
    settings as the command line spells them; :class:`TypeError` for keywords that are no setting.
    """

    def __init__(
        self,
        bundle: Bundle,
        loop: Loop,
        reader: Reader,
        runtime: Callable[[], Backend],
        *,
        picture_bytes: int,
        one_thread: bool,
        note: Note,
    ) -> None:
        """For :func:`d3tom_export.open`."""
        self._bundle, self._loop, self._reader, self._runtime, self._note = bundle, loop, reader, runtime, note
        self._seen = SeenPictures(picture_bytes)
        self._lock = threading.RLock()
        self._backend: Backend | None = None
        self._closed = False
        self._one_thread = one_thread
        self._thread = 0

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<d3tom_export.Model {str(self._bundle.folder)!r}, {self._loop}{', closed' if self._closed else ''}>"

    @property
    def kv_cache(self) -> bool:
        """Whether it runs the loop with a KV cache."""
        return self._loop == "cached"

    @contextmanager
    def _runtime_alone(self) -> Iterator[Backend]:
        """The backend, loaded, for the calling thread alone."""
        with self._lock:
            if self._closed:
                raise D3tomError(f"The model of {self._bundle.folder} is closed. Open it again to ask it more.")
            if self._backend is None:
                self._backend, self._thread = self._runtime(), threading.get_ident()
            if self._one_thread and threading.get_ident() != self._thread:
                raise D3tomError(
                    f"Engines of {self._backend.name} are used in the thread that opened them, and this is another. "
                    "Ask in that thread, or open a model in each."
                )
            yield self._backend

    def load(self) -> None:
        """Load the stages, unless they are: ``open`` has done so, but with ``load=False``."""
        with self._runtime_alone():
            pass

    def close(self) -> None:
        """Let the runtime go, once what it is at has ended: an :meth:`answer`, a batch, or a step. Twice is fine."""
        with self._lock:
            self._closed, self._backend, self._seen = True, None, SeenPictures(0)

    def see(self, image: Picture) -> Pictures:
        """Read pictures and cut them for the tower: for several questions about them, in place of ``image``."""
        return see(self._reader, image, self._note)

    def _see(self, image: Picture, between: Callable[[], None]) -> Pictures:
        """As :meth:`see`; ``between`` is called before each picture, and may end it by an error."""
        return see(self._reader, image, self._note, between)

    def check(self, pictures: Pictures | int, question: Question, **settings: Unpack[Settings]) -> None:
        """Refuse what :meth:`answer` would refuse; nothing is run.

        Args:
            pictures: What :meth:`see` gave, or how many there will be: then what depends on their sizes is not known.
            question: As for :meth:`answer`.
            **settings: Likewise.
        """
        asked, turns = self._asked(question, settings)
        if isinstance(pictures, int):
            asked.reader.check_text(turns, pictures, asked.generation)
        else:
            asked.reader.check_length(turns, pictures.views, asked.generation)

    def answer(self, image: Picture, question: Question, **settings: Unpack[Settings]) -> Answer:
        """Answer a question.

        Args:
            image: What is asked about: a path, the bytes of a picture's file, an image of Pillow's, an array of uint8
                (H, W), (H, W, 3) or (H, W, 4), a list of these, what :meth:`see` gave, or None.
            question: A text, or a conversation: messages ``{"role": ..., "content": ...}`` that end with the user's.
                Pictures stand at its start unless it places each with ``<image>``.
            **settings: How this answer departs from the bundle's way: :class:`Settings`.
        """
        ready = self._ready(image, question, settings)
        with self._lock:  # a whole answer at a time: two in turns would both be late
            return Steps(self, ready).answer

    def steps(self, image: Picture, question: Question, **settings: Unpack[Settings]) -> Steps:
        """As :meth:`answer`, step by step: an iterator over :class:`Step`, whose ``answer`` is the whole one's."""
        return Steps(self, self._ready(image, question, settings))

    def answer_many(self, requests: Iterable[Request], *, batch: int = 4) -> list[Answer | D3tomError]:
        """Answer requests, in their order; one that cannot be answered has its :class:`D3tomError` in its place.

        Those of equal layout run as one batch: as many prompt tokens, visual tokens at the same places, and the same
        settings but for the seed. Each answer is what :meth:`answer` gives: docs/api.md says what holds of that in
        which precision. Requests are taken ``4 * batch`` at a time, whose prompts are held: (P, D) float32 each.

        Args:
            requests: Any number.
            batch: The most that run at once; fewer where engines are built for fewer.
        """
        if not isinstance(batch, int) or batch < 1:
            raise D3tomError(f"A batch of {shown(batch)} answers cannot be; give an integer, 1 or more.")
        found: list[Answer | D3tomError] = []
        waiting = iter(requests)
        while window := list(islice(waiting, _WINDOW * batch)):
            found += self._answer_window(window, batch)
        return found

    def describe(self) -> Description:
        """What it is, and how it answers unless told otherwise."""
        with self._runtime_alone() as backend:
            manifest, config = self._bundle.manifest, self._bundle.config
            return Description(
                folder=str(self._bundle.folder),
                model=manifest.model_name,
                family=config.family,
                weights=manifest.weights,
                sees=config.vision is not None,
                layers=config.language.n_layers,
                max_tokens=config.language.max_sequence_length,
                loops=manifest.loops,
                kv_cache=backend.kv_cache,
                shares_prefix=backend.shares_prefix,
                backend=backend.name,
                precision=backend.precision,
                merge=manifest.merge.in_loop(backend.kv_cache),
                generation=manifest.generation,
                system=self._reader.prompt.system,
                validated=None if manifest.validation is None else bool(manifest.validation["passed"]),
            )

    def fingerprint(self, **settings: Unpack[Settings]) -> dict[str, str]:
        """Short hashes of what answers follow from, beside question, picture and runtime: equal ones, equal answers.

        "model": the contents of the bundle's weights, config, tokenizer and stages; "wording": how it is asked;
        "settings": loop, merging and generation.
        """
        from d3tom_export.quality.fingerprint import bundle_fingerprint, fingerprint_of, wording_fingerprint

        asked, _ = self._asked("", settings)
        rest = [asked.merge.to_json(), asked.generation.to_json(), asked.share_prefix, asked.raw_text]
        return {
            "model": bundle_fingerprint(self._bundle)[:_SHORT],
            "wording": wording_fingerprint(asked.reader.prompt)[:_SHORT],
            "settings": fingerprint_of([self._loop, asked.reader.ignore_orientation, *rest])[:_SHORT],
        }

    def _built_fingerprint(self) -> str:
        """For :mod:`d3tom_export.batch`: of the int8 or half-precision graphs or the engines that the runtime reads.

        Short; "" where it reads the bundle's own stages alone.
        """
        from d3tom_export.quality.fingerprint import built_fingerprint

        with self._runtime_alone() as backend:
            return built_fingerprint(self._bundle, backend.name, backend.precision)

    def _asked(self, question: Question, settings: Any) -> tuple[Asked, Any]:
        turns = conversation_of(question)
        return resolve(self._bundle.manifest, self._reader, self._loop, turns, settings), turns

    def _ready(self, image: Picture, question: Question, settings: Any) -> Ready:
        """Refuse what can be refused, then read the pictures, then embed the prompt."""
        asked, turns = self._asked(question, settings)
        asked.reader.check_text(turns, count_pictures(image), asked.generation)
        pictures = self.see(image)
        with self._runtime_alone() as backend:
            started = time.perf_counter()
            prompt = asked.reader.read(backend, turns, pictures.views, asked.generation, self._seen)
            return Ready(asked, prompt, time.perf_counter() - started)

    def _answer_window(self, requests: Sequence[Request], batch: int) -> list[Answer | D3tomError]:
        found: dict[int, Answer | D3tomError] = {}
        ready: dict[int, Ready] = {}
        for place, request in enumerate(requests):
            try:
                ready[place] = self._ready(request.image, request.question, request.settings)
            except Exception as error:
                found[place] = _as_error(error)
        if ready:
            try:
                with self._runtime_alone() as backend:
                    most = batch_limit(backend, batch)
            except D3tomError:  # closed meanwhile: each of them says so, and loses no other
                most = 1
            for places in grouped(ready, self.kv_cache, most):
                found |= zip(places, self._answer_group([ready[place] for place in places]), strict=True)
        return [found[place] for place in range(len(requests))]

    def _answer_group(self, group: Sequence[Ready]) -> list[Answer | D3tomError]:
        """Together where that goes, else one by one: a batch may take more memory than there is."""
        try:
            with self._runtime_alone() as backend:
                answers = answer_together(backend, group)
        except Exception as error:
            if len(group) == 1:
                return [_as_error(error)]
            answers = None
        if answers is not None:
            return list(answers)
        return [answer for ready in group for answer in self._answer_group([ready])]


class Steps(Iterator[Step]):
    """An answer that is being made: each ``next`` runs one step. ``Model.steps`` gives it, its prompt embedded.

    It may be left at any time; what it holds of the runtime's memory goes with it, or with :meth:`close`. A context.
    """

    def __init__(self, model: Model, ready: Ready) -> None:
        self._model, self._ready = model, ready
        self._rows = RowRecords(1, noisy=False, at_prefill=True)
        self._loop: Iterator[StepRecord] | None = None
        self._ended, self._seconds = False, 0.0
        self._answer: Answer | None = None

    @property
    def prompt_tokens(self) -> int:
        """P, visual ones among them."""
        return self._ready.prompt.embeddings.shape[1]

    @property
    def visual_tokens(self) -> int:
        """V."""
        return len(self._ready.prompt.visual_positions)

    @property
    def total(self) -> int:
        """Steps that the answer has at most."""
        return self._ready.asked.generation.total_steps

    def __iter__(self) -> Steps:
        return self

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Run no further step."""
        with self._model._lock:
            self._loop, self._ended = None, True

    def __next__(self) -> Step:
        if self._ended:
            raise StopIteration
        ready, asked = self._ready, self._ready.asked
        with self._model._runtime_alone() as backend:
            if self._ended:  # closed by another thread while this one waited
                raise StopIteration
            started = time.perf_counter()
            try:
                if self._loop is None:
                    mask = asked.reader.config.language.mask_token_id
                    self._loop = run_loop(
                        backend, ready.prompt, mask, asked.generation, asked.merge, share_prefix=asked.share_prefix
                    )
                record = next(self._loop, None)
            except BaseException:
                self.close()
                raise
            self._seconds += time.perf_counter() - started
            if record is None:
                self.close()
                self._answer = answer_of(backend, ready, self._rows.last[0], self._rows.kept[0], self._seconds)
                raise StopIteration
            self._rows.add(record)
        return self._reached(record)

    @property
    def start(self) -> Step:
        """What there is to show before the first step: all masks. Its number is 0."""
        asked = self._ready.asked
        ids = [asked.reader.config.language.mask_token_id] * asked.generation.gen_length
        return self._step(0, self.visual_tokens, False, ids, (), Said(ids, [False] * len(ids)))

    def _reached(self, record: StepRecord) -> Step:
        asked, number = self._ready.asked, len(self._rows.kept[0])
        so_far = said(record, frozenset() if asked.raw_text else frozenset(asked.generation.end_ids))
        committed = tuple(record.transfer[0].nonzero()[0].tolist())
        return self._step(number, record.keep, record.merged, record.tokens[0].tolist(), committed, so_far)

    def _step(
        self, number: int, kept: int, merged: bool, ids: Sequence[int], committed: tuple[int, ...], so_far: Said
    ) -> Step:
        suffix = self._ready.asked.generation.suffix_ids
        return Step(
            number=number,
            total=self.total,
            kept=kept,
            visual_tokens=self.visual_tokens,
            merged=merged,
            token_ids=tuple(ids),
            committed=committed,
            said=Said([*so_far.ids, *suffix], [*so_far.new, *[False] * len(suffix)]),
            _asked=self._ready.asked,
        )

    @property
    def answer(self) -> Answer:
        """The whole answer; runs what steps are left. Raises :class:`D3tomError` where it was closed before its end."""
        for _ in self:
            pass
        if self._answer is None:
            raise D3tomError("This answer was not finished: it was closed, or a step of it failed. Ask again.")
        return self._answer


def _as_error(error: Exception) -> D3tomError:
    """What stands in the place of a request's answer; of an unexpected failure, which is its ``__cause__``."""
    if isinstance(error, D3tomError):
        return error
    found = UnexpectedError(
        f"The request stopped on an unexpected {type(error).__name__}: {error}. Unless memory ran out, this is a "
        "defect of d3tom-export; please report it."
    )
    found.__cause__ = error
    return found
