"""Faults of a backend's own code, around right graphs and weights: sessions, confidences, what it embeds.

The same spoiled sessions stand on ONNX Runtime in float32 and in int8, and on the stub of a GPU's backend (low.py).
B batch, G answer tokens, V visual tokens, K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.loop.denoise import Floats, Ints, Session, StepRequest, StepResult
from d3tom_export.loop.sampling import softmax64
from tests.mutation.fault import FEWER, Fault, Outcome, Precision, Subject, Subjects, validate
from tests.mutation.low import StubBackend, arguments_of, stub


@dataclass
class Spoiled:
    """A session that goes wrong: ``ask`` changes what it is asked, ``answer`` what it answers."""

    session: Session
    visual: int
    ask: Callable[[Spoiled, StepRequest], StepRequest] | None = None
    answer: Callable[[Spoiled, StepRequest, StepResult], StepResult] | None = None
    steps: int = 0
    before: StepRequest | None = None
    """The last request as it was asked."""
    mask: int = -1
    """The mask token, which the first step shows everywhere."""

    @property
    def first_token(self) -> Ints | None:
        return self.session.first_token

    def step(self, request: StepRequest) -> StepResult:
        self.mask = int(request.answer_ids[0, 0]) if self.steps == 0 else self.mask
        asked = request if self.ask is None else self.ask(self, request)
        result = self.session.step(asked)
        if self.answer is not None:
            result = self.answer(self, request, result)
        self.steps, self.before = self.steps + 1, request
        return result


Ask = Callable[[Spoiled, StepRequest], StepRequest]
Answer = Callable[[Spoiled, StepRequest, StepResult], StepResult]
Start = Callable[[Floats, Ints], tuple[Floats, Ints]]
Embed = Callable[[Floats], Floats]


@dataclass(frozen=True)
class HostFault(Fault):
    """A backend whose code goes wrong on a right bundle."""

    ask: Ask | None = None
    answer: Answer | None = None
    start: Start | None = None
    tokens: Embed | None = None
    views: Embed | None = None

    def run(self, subjects: Subjects, scratch: Path) -> Outcome:
        folder = scratch / "bundle"
        folder.symlink_to(subjects.small if self.subject == "small" else subjects.bundled)
        low = self.precision in ("fp16", "bf16")
        with stub() if low else _nothing_else(), self._spoiled(StubBackend if low else OnnxRuntimeBackend):
            return validate(folder, self.arguments(subjects))

    @contextmanager
    def _spoiled(self, backend: type) -> Iterator[None]:
        start, tokens, views = backend.start, backend.embed_tokens, backend.encode_views

        def started(this: Any, embeddings: Floats, positions: Ints, **more: Any) -> Any:
            own = type(this) is backend  # the reference of the stages is a kind of it, and right
            if self.start is not None and own:
                embeddings, positions = self.start(embeddings, positions)
            session = start(this, embeddings, positions, **more)
            if not own:
                return session
            return Spoiled(session, len(positions), self.ask, self.answer)

        def embedded(this: Any, token_ids: Ints) -> Floats:
            found = tokens(this, token_ids)
            return found if self.tokens is None or type(this) is not backend else self.tokens(found)

        def seen(this: Any, pixels: Floats) -> Floats:
            found = views(this, pixels)
            return found if self.views is None or type(this) is not backend else self.views(found)

        with patch.multiple(backend, start=started, embed_tokens=embedded, encode_views=seen):
            yield


@contextmanager
def _nothing_else() -> Iterator[None]:
    yield


def _nothing(folder: Path) -> None:
    """The bundle is right."""


def _host(
    name: str,
    place: str,
    *,
    precisions: tuple[Precision, ...] = ("fp32", "bf16"),
    subject: Subject = "small",
    loop: str = "--no-kv-cache",
    samples: int | None = None,
    **rest: Any,
) -> list[Fault]:
    """A fault on each of ``precisions``."""
    faults: list[Fault] = []
    for precision in precisions:
        options: tuple[str, ...] = arguments_of(precision, loop)
        if precision == "fp32":
            options = ("--backend", "onnxruntime", "--graphs", "tuned", loop)
        elif precision == "int8":
            options = ("--precision", "int8", loop)
        if not rest.get("reason"):
            options += FEWER if samples is None else ("--samples", str(samples))
        of = "bundled model, " if subject == "bundled" else ""
        where = f"{precision} {of}{place}"
        faults.append(
            HostFault(
                name,
                "backend",
                where,
                _nothing,
                subject=subject,
                precision=precision,
                options=options,
                slow=subject == "bundled",
                **rest,
            )
        )
    return faults


def confidence(change: Callable[[Floats], Floats]) -> Answer:
    return lambda _, request, result: replace(result, confidence=change(result.confidence))


def of_softmax(logits: Callable[[Floats], Floats]) -> Answer:
    """The chosen token's probability in another softmax."""

    def change(_: Spoiled, request: StepRequest, result: StepResult) -> StepResult:
        assert result.logits is not None
        others = softmax64(logits(result.logits))
        return replace(result, confidence=np.take_along_axis(others, result.token[..., None], axis=-1)[..., 0])

    return change


def second_choice_of_the_unsure(here: Spoiled, request: StepRequest, result: StepResult) -> StepResult:
    """The least sure position, which is committed last, has its second likeliest token."""
    assert result.logits is not None
    token = result.token.copy()
    assert result.choices is not None
    second = np.argsort(result.logits[..., : result.choices.rows], axis=-1)[..., -2]
    worst = np.where(request.answer_ids == here.mask, result.confidence, np.inf).argmin(axis=1)
    rows = np.arange(len(token))
    token[rows, worst] = second[rows, worst]
    return replace(result, token=token)


def _kept(change: Callable[[Ints, int], Ints]) -> Answer:
    def spoil(here: Spoiled, request: StepRequest, result: StepResult) -> StepResult:
        return result if result.kept is None else replace(result, kept=change(result.kept, here.visual))

    return spoil


def last_kept(number: Callable[[int], int]) -> Answer:
    """The last visual token, where kept, goes by another number."""
    return _kept(lambda kept, visual: np.where(kept == visual - 1, number(visual), kept))


def logits(change: Callable[[Floats], Floats]) -> Answer:
    def spoil(_: Spoiled, request: StepRequest, result: StepResult) -> StepResult:
        assert result.logits is not None
        return replace(result, logits=change(result.logits).astype(np.float32))

    return spoil


def coherent(change: Callable[[Floats], Floats], where: Callable[[Spoiled, StepRequest], bool]) -> Answer:
    """Other logits at some steps, with the tokens and confidences that follow from them."""

    def spoil(here: Spoiled, request: StepRequest, result: StepResult) -> StepResult:
        if not where(here, request):
            return result
        assert result.logits is not None
        found = change(result.logits).astype(np.float32)
        assert result.choices is not None
        token = found[..., : result.choices.rows].argmax(axis=-1)
        sure = np.take_along_axis(softmax64(found), token[..., None], axis=-1)[..., 0]
        return replace(result, logits=found, token=token, confidence=sure)

    return spoil


def rolled(found: Floats) -> Floats:
    """Each answer position has its neighbour's logits."""
    return np.roll(found, 1, axis=1)


def all_committed_decide(here: Spoiled, request: StepRequest) -> StepRequest:
    return replace(request, deciders=request.answer_ids != here.mask)


def masked_decide(here: Spoiled, request: StepRequest) -> StepRequest:
    return replace(request, deciders=request.answer_ids == here.mask) if request.merge else request


def deciders_one_step_late(here: Spoiled, request: StepRequest) -> StepRequest:
    before = here.before
    return request if before is None or not before.merge else replace(request, deciders=before.deciders)


def second_row_inverted(_: Spoiled, request: StepRequest) -> StepRequest:
    deciders = request.deciders.copy()
    deciders[1:] ^= True
    return replace(request, deciders=deciders)


def answer_one_step_old(here: Spoiled, request: StepRequest) -> StepRequest:
    return request if here.before is None else replace(request, answer_ids=here.before.answer_ids)


def keep_changed(by: int) -> Ask:
    def ask(here: Spoiled, request: StepRequest) -> StepRequest:
        return replace(request, keep=min(max(request.keep + by, 1), max(here.visual, 1)))

    return ask


def never_merges(here: Spoiled, request: StepRequest) -> StepRequest:
    return replace(request, keep=here.visual)


def first_row_for_all(_: Spoiled, request: StepRequest, result: StepResult) -> StepResult:
    def first(x: Any) -> Any:
        return None if x is None else np.repeat(x[:1], len(x), axis=0)

    return replace(
        result,
        token=first(result.token),
        confidence=first(result.confidence),
        logits=first(result.logits),
        kept=first(result.kept),
    )


def visual_shifted(embeddings: Floats, positions: Ints) -> tuple[Floats, Ints]:
    return embeddings, positions + 1


def last_visual_as_text(embeddings: Floats, positions: Ints) -> tuple[Floats, Ints]:
    return embeddings, positions[:-1] if len(positions) > 1 else positions


def prompt_reversed(embeddings: Floats, positions: Ints) -> tuple[Floats, Ints]:
    return np.ascontiguousarray(embeddings[:, ::-1]), positions


def last_row_zeroed(embeddings: Floats, positions: Ints) -> tuple[Floats, Ints]:
    spoiled = embeddings.copy()
    spoiled[:, -1] = 0
    return spoiled, positions


def beyond(length: int) -> Embed:
    """Right up to so many tokens at a time."""

    def change(found: Floats) -> Floats:
        spoiled = found.copy()
        spoiled[:, length:] = 0
        return spoiled

    return change


def rows_equal(found: Floats) -> Floats:
    return np.repeat(found[:1], len(found), axis=0)


def only_views(count: int) -> Embed:
    """Right for so many views at a time."""
    return lambda found: found if len(found) == count else found * np.float32(1.05)


def _lone(here: Spoiled, request: StepRequest) -> bool:
    return request.answer_ids.shape[0] == 1 and here.visual == 0


def _batch(here: Spoiled, request: StepRequest) -> bool:
    return request.answer_ids.shape[0] > 1


def _first(here: Spoiled, request: StepRequest) -> bool:
    return here.steps == 0


def _last(here: Spoiled, request: StepRequest) -> bool:
    """Whether as many masks are left as the step before committed: steps of these plans commit equally many."""
    if here.before is None:
        return False
    before, left = (int((each.answer_ids == here.mask).sum(axis=1).max()) for each in (here.before, request))
    return left <= before - left


def _unmerged(here: Spoiled, request: StepRequest) -> bool:
    return not request.merge


def _two_runs(here: Spoiled, request: StepRequest) -> bool:
    return request.answer_ids.shape[0] > 1 and request.merge


BOTH: tuple[Precision, ...] = ("fp32", "bf16")
FULL: tuple[Precision, ...] = ("fp32",)
BUNDLED: dict[str, Any] = {"subject": "bundled", "precisions": ("fp32", "bf16", "int8"), "samples": 1}

FAULTS: list[Fault] = [
    *_host("doubt twice as large", "session", answer=confidence(lambda c: c / (2 - c))),
    *_host("doubt twice as large", "session", answer=confidence(lambda c: c / (2 - c)), **BUNDLED),
    *_host("doubt 1.3 times as large", "session", answer=confidence(lambda c: c / (c + 1.3 * (1 - c))), **BUNDLED),
    *_host("confidence squared", "session", answer=confidence(np.square)),
    *_host("confidence negated", "session", answer=confidence(np.negative)),
    *_host("confidence the same everywhere", "session", answer=confidence(np.ones_like)),
    *_host("confidence NaN", "session", answer=confidence(lambda c: c * np.nan)),
    *_host("confidence of a softmax at temperature 2", "session", answer=of_softmax(lambda x: x / 2)),
    *_host("second choice of the least sure position", "session", answer=second_choice_of_the_unsure),
    *_host("kept tokens in reverse order", "session", answer=_kept(lambda kept, _: kept[:, ::-1])),
    *_host("kept tokens one up", "session", answer=_kept(lambda kept, _: kept + 1)),
    *_host("last visual token kept as -1", "session", answer=last_kept(lambda _: -1), samples=8),
    *_host("last visual token kept as V", "session", answer=last_kept(lambda visual: visual), samples=8),
    *_host("logits all 0.5 higher", "session", answer=logits(lambda x: x + 0.5), precisions=FULL),
    *_host("logits rounded to float16", "session", answer=logits(lambda x: x.astype(np.float16)), precisions=FULL),
    *_host("logits without the padding rows", "session", answer=logits(lambda x: x[..., :262])),
    *_host("logits of one row only", "session", answer=logits(lambda x: x[:, :1])),
    *_host("logits infinite in the padding rows", "session", answer=logits(lambda x: np.where(x == x, np.inf, x))),
    *_host("answer positions one late", "session", answer=coherent(rolled, lambda *_: True)),
    *_host("answer positions one late at the first step", "session", answer=coherent(rolled, _first)),
    *_host("answer positions one late at the last step", "session", answer=coherent(rolled, _last)),
    *_host("answer positions one late at steps without merge", "session", answer=coherent(rolled, _unmerged)),
    *_host("answer positions one late without a picture", "session", answer=coherent(rolled, _lone)),
    *_host("answer positions one late in a batch", "session", answer=coherent(rolled, _batch)),
    *_host("logits 30 % large at the last step", "session", answer=coherent(lambda x: x * 1.3, _last), **BUNDLED),
    *_host("logits 30 % large without a picture", "session", answer=coherent(lambda x: x * 1.3, _lone), **BUNDLED),
    *_host("logits 30 % large in a batch", "session", answer=coherent(lambda x: x * 1.3, _batch), **BUNDLED),
    *_host("logits 10 % large in a batch", "session", answer=coherent(lambda x: x * 1.1, _batch), **BUNDLED),
    *_host("all tokens that were committed decide", "session", ask=all_committed_decide),
    *_host("masked tokens decide", "session", ask=masked_decide),
    *_host("deciders of the step before", "session", ask=deciders_one_step_late),
    *_host("deciders inverted from the second row on", "session", ask=second_row_inverted),
    *_host("answer of the step before", "session", ask=answer_one_step_old),
    *_host("one token fewer kept", "session", ask=keep_changed(-1)),
    *_host("one token more kept", "session", ask=keep_changed(1)),
    *_host("nothing merged", "session", ask=never_merges),
    *_host("rows of a batch answer as the first", "session", answer=first_row_for_all),
    *_host("visual positions one late", "session", start=visual_shifted),
    *_host("last visual token taken for text", "session", start=last_visual_as_text, precisions=("bf16",)),
    *_host("prompt reversed", "session", start=prompt_reversed),
    *_host("last token of the prompt zeroed", "session", start=last_row_zeroed),
    *_host("masked tokens decide", "session with a cache", ask=masked_decide, loop="--kv-cache"),
    *_host("deciders of the step before", "session with a cache", ask=deciders_one_step_late, loop="--kv-cache"),
    *_host("deciders inverted from the second row on", "cached session", ask=second_row_inverted, loop="--kv-cache"),
    *_host("answer of the step before", "session with a cache", ask=answer_one_step_old, loop="--kv-cache"),
    *_host("nothing merged", "session with a cache", ask=never_merges, loop="--kv-cache"),
    *_host("rows of a batch answer as the first", "session with a cache", answer=first_row_for_all, loop="--kv-cache"),
    *_host(
        "answer positions one late at the last step",
        "cached session",
        answer=coherent(rolled, _last),
        loop="--kv-cache",
    ),
    *_host("embeddings zeroed from the ninth token on", "embedding", tokens=beyond(8)),
    *_host("rows of a batch embedded as the first", "embedding", tokens=rows_equal),
    *_host("views in reverse order", "eyes", views=lambda x: x[::-1].copy()),
    *_host("all views as the first", "eyes", views=rows_equal),
    *_host("features 5 % large but of two views", "eyes", views=only_views(2), precisions=("fp32",)),
    *_host(
        "features 5 % large but of two views",
        "eyes",
        views=only_views(2),
        precisions=("bf16",),
        reason="bf16 moves these features by 1.2 %, three times which and two units are 5.03 %",
    ),
    *_host("features NaN", "eyes", views=lambda x: x * np.float32(np.nan)),
]
