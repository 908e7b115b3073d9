"""Faults in fp16 and bf16, on a stub in the place of a GPU's backend: the oracle's own model in that precision.

No graph runs in these precisions on a CPU that ``validate`` would take, so what is put wrong is the model itself, or
what it gives out. ``validate`` is asked for TensorRT, whose backend the stub replaces where it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from d3tom_export.backends import select
from d3tom_export.backends.pytorch import PRECISIONS, PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import Loop
from d3tom_export.loop.denoise import Floats, Ints, Session, StepRequest, StepResult
from d3tom_export.model.lavida import Lavida
from tests.mutation.fault import Fault, Outcome, Precision, Subject, Subjects, validate

SpoilModel = Callable[[Lavida], None]
SpoilResult = Callable[[StepResult], StepResult]


class _SpoiledSession:
    def __init__(self, session: Session, spoil: SpoilResult) -> None:
        self._session, self._spoil = session, spoil
        self.first_token = session.first_token

    def step(self, request: StepRequest) -> StepResult:
        return self._spoil(self._session.step(request))


class StubBackend(PyTorchBackend):
    """PyTorch in low precision with ``model`` and ``result`` spoiled."""

    name = "stub"

    def __init__(
        self, bundle: Bundle, loop: Loop, precision: str, model: SpoilModel | None, result: SpoilResult | None
    ) -> None:
        loaded = load_model(open_checkpoint(bundle.folder, vocab_rows=bundle.manifest.vocab_rows))
        loaded = loaded.to(PRECISIONS[precision])
        if model is not None:
            before = [parameter.clone() for parameter in loaded.parameters()]
            with torch.no_grad():
                model(loaded)
            after = list(loaded.parameters())
            assert len(after) != len(before) or any(
                not torch.equal(a, b) for a, b in zip(after, before, strict=True)
            ), "the fault changed nothing in the model"
        self._spoil = result
        super().__init__(loaded, bundle.manifest.merge, kv_cache=loop == "cached")

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, **more: Any) -> Any:
        session = super().start(prompt_embeddings, visual_positions, **more)
        return session if self._spoil is None else _SpoiledSession(session, self._spoil)


@contextmanager
def stub(model: SpoilModel | None = None, result: SpoilResult | None = None) -> Iterator[None]:
    """Opens :class:`StubBackend` wherever a backend is asked for by name."""

    def open_backend(name: str, bundle: Bundle, loop: Loop, *, precision: str, **rest: Any) -> StubBackend:
        assert name == "tensorrt"
        return StubBackend(bundle, loop, precision, model, result)

    with patch.object(select, "open_backend", open_backend):
        yield


def arguments_of(precision: Precision, loop: str) -> tuple[str, ...]:
    return ("--backend", "tensorrt", "--precision", precision, loop)


@dataclass(frozen=True)
class BackendFault(Fault):
    """A backend that goes wrong on a right bundle."""

    model: SpoilModel | None = None
    result: SpoilResult | None = None

    def run(self, subjects: Subjects, scratch: Path) -> Outcome:
        folder = scratch / "bundle"
        folder.symlink_to(subjects.small if self.subject == "small" else subjects.bundled)
        with stub(self.model, self.result):
            return validate(folder, self.arguments(subjects))


def _nothing(folder: Path) -> None:
    """The bundle is right."""


def _fault(
    name: str,
    place: str,
    model: SpoilModel | None = None,
    result: SpoilResult | None = None,
    *,
    precisions: tuple[Precision, ...] = ("bf16", "fp16"),
    subject: Subject = "small",
    loop: str = "--no-kv-cache",
    samples: int = 3,
    **rest: Any,
) -> list[Fault]:
    """A fault in each of ``precisions``; fp16, which PyTorch multiplies slowly on a CPU, is left to `make slow`."""
    count = () if rest.get("reason") else ("--samples", str(samples))
    return [
        BackendFault(
            name,
            "backend",
            f"{precision} {place}",
            _nothing,
            subject=subject,
            precision=precision,
            options=(*arguments_of(precision, loop), *count),
            model=model,
            result=result,
            slow=precision == "fp16",
            **rest,
        )
        for precision in precisions
    ]


def _bundled(name: str, model: SpoilModel | None = None, **rest: Any) -> list[Fault]:
    """A fault on the bundled model, whose answers mean something: the review's, and what needs sure answers."""
    options: dict[str, Any] = {"precisions": ("bf16",), "subject": "bundled", "samples": 1, "review": model is not None}
    return _fault(name, "bundled model", model, **options, **rest)


def head_negated(model: Lavida) -> None:
    model.transformer.ff_out.weight.neg_()


def final_norm_dropped(model: Lavida) -> None:
    model.transformer.ln_f = nn.Identity()  # type: ignore[assignment]


def layers_zeroed(*layers: int) -> SpoilModel:
    def spoil(model: Lavida) -> None:
        for layer in layers:
            model.transformer.blocks[layer].attn_out.weight.zero_()
            model.transformer.blocks[layer].ff_out.weight.zero_()

    return spoil


def projector_negated(model: Lavida) -> None:
    for parameter in model.model.mm_projector[2].parameters():
        parameter.neg_()


def weight_scaled(layer: int, factor: float) -> SpoilModel:
    def spoil(model: Lavida) -> None:
        model.transformer.blocks[layer].ff_out.weight.mul_(factor)

    return spoil


def value_negated(model: Lavida) -> None:
    model.transformer.blocks[2].v_proj.weight.neg_()


def embeddings_shifted(model: Lavida) -> None:
    wte = model.transformer.wte.weight
    wte.copy_(wte.roll(1, dims=0))


def newline_zeroed(model: Lavida) -> None:
    model.model.image_newline.zero_()


def tower_scaled(model: Lavida) -> None:
    model.model.mm_projector[0].weight.mul_(1.1)


def tokens_one_up(result: StepResult) -> StepResult:
    return replace(result, token=result.token + 1)


def confidence_reversed(result: StepResult) -> StepResult:
    return replace(result, confidence=1.0 - result.confidence)


def least_important_kept(result: StepResult) -> StepResult:
    """As many tokens as were kept, those with the lowest scores."""
    if result.kept is None or result.scores is None or result.kept.shape[1] == result.scores.shape[1]:
        return result
    count, visual = result.kept.shape[1], result.scores.shape[1]
    worst = np.sort(np.argsort(result.scores[0])[:count])[None]
    assert count < visual
    return replace(result, kept=worst.astype(np.int64))


def nothing_kept(result: StepResult) -> StepResult:
    return replace(result, kept=None)


def logits_scaled(result: StepResult) -> StepResult:
    assert result.logits is not None
    return replace(result, logits=result.logits * np.float32(1.05))


def logits_nan(result: StepResult) -> StepResult:
    assert result.logits is not None
    logits = result.logits.copy()
    logits[..., -1] = np.nan
    return replace(result, logits=logits)


def logits_missing(result: StepResult) -> StepResult:
    return replace(result, logits=None)


FAULTS: list[Fault] = [
    *_fault("language head negated", "model", head_negated),
    *_bundled("language head negated", head_negated),
    *_fault("final norm dropped", "model", final_norm_dropped),
    *_bundled("final norm dropped", final_norm_dropped),
    *_fault("layers 2 and 3 zeroed", "model", layers_zeroed(2, 3), precisions=("bf16",)),
    *_bundled("layers 4 to 7 zeroed", layers_zeroed(4, 5, 6, 7)),
    *_fault("projector negated", "model", projector_negated),
    *_bundled("projector negated", projector_negated),
    *_fault("one layer's weight times 1.1", "model", weight_scaled(2, 1.1), samples=8),
    *_fault(
        *("one layer's weight times 1.1", "model with a cache", weight_scaled(2, 1.1)),
        precisions=("fp16",),
        samples=8,
        loop="--kv-cache",
    ),
    *_fault(
        *("one layer's weight times 1.1", "model with a cache", weight_scaled(2, 1.1)),
        precisions=("bf16",),
        loop="--kv-cache",
        reason="it moves the random model's logits by 9 % of the largest, and bf16 itself by a third of that",
        by_chance=True,
    ),
    *_fault("values of one layer negated", "model with a cache", value_negated, loop="--kv-cache"),
    *_fault("embedding table shifted by one row", "model", embeddings_shifted, precisions=("bf16",)),
    *_fault("newline zeroed", "model", newline_zeroed, precisions=("fp16",)),
    *_fault(
        "newline zeroed",
        "model",
        newline_zeroed,
        precisions=("bf16",),
        reason="the synthetic newline is a tenth as large as other embeddings, less than bf16 moves a picture's",
    ),
    *_fault("projector's first weight times 1.1", "model", tower_scaled, precisions=("bf16",)),
    *_fault("tokens one up", "result", result=tokens_one_up),
    *_fault("confidence reversed", "result", result=confidence_reversed),
    *_bundled("confidence reversed", result=confidence_reversed),
    *_bundled("logits times 1.05", result=logits_scaled),
    *_fault("the least important kept", "result", result=least_important_kept),
    *_fault("kept set missing", "result", result=nothing_kept, precisions=("bf16",)),
    *_fault("logits times 1.05", "result", result=logits_scaled, precisions=("fp16",)),
    *_fault(
        "logits times 1.05",
        "result",
        result=logits_scaled,
        precisions=("bf16",),
        reason="bf16 moves a random model's logits as much; the bundled model's it does not",
    ),
    *_fault("one logit NaN", "result", result=logits_nan, precisions=("bf16",)),
    *_fault("logits missing", "result", result=logits_missing, precisions=("bf16",)),
]
