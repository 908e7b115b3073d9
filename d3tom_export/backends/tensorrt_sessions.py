"""Answers in progress on TensorRT: what both loops share, and the one without a KV cache.

A step is one sequence of copies and launches (tensorrt_runner). Each device buffer bears the name of the tensor it
holds, so a stage's output is the next stage's input by lying where it is: nothing crosses to the host between stages.
Up go the answer's ids and the deciders, down come token, doubt, the kept set and, where asked for, what the position's
certainty follows from, and logits.

B batch, P prompt, G answer tokens, V visual tokens, K kept, C = P - V + K, N key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from d3tom_export.backends.tensorrt_dtypes import from_engine
from d3tom_export.backends.tensorrt_loaded import LoadedEngines
from d3tom_export.backends.tensorrt_runner import Operation
from d3tom_export.backends.tensorrt_stage import Axes, Launch
from d3tom_export.engines.stages import STEP, buffers
from d3tom_export.loop.answer_rows import certainty_stage_for, step_result
from d3tom_export.loop.denoise import Floats, Ints, StepRequest, StepResult
from d3tom_export.stages.contract import TensorSpec


class Fetched:
    """Outputs on their way to the host; there when the step has been waited for."""

    def __init__(self) -> None:
        self._arrays: dict[str, tuple[NDArray, TensorSpec]] = {}

    def add(self, tensor: TensorSpec, array: NDArray) -> None:
        self._arrays[tensor.name] = (array, tensor)

    def __getitem__(self, name: str) -> NDArray:
        """A copy: the pinned memory serves the next step."""
        array, tensor = self._arrays[name]
        return from_engine(array, tensor.dtype)


class AnswerSession:
    """What both loops need: the answer's sizes and buffers, and the parts of a step that they share."""

    first_token: Ints | None = None
    _shifted = False
    """Whether rows are the next slot's (:func:`~d3tom_export.loop.answer_rows.step_result`)."""

    def __init__(self, loaded: LoadedEngines, prompt_embeddings: Floats, visual_positions: Ints) -> None:
        self._loaded = loaded
        self._visual_tokens = len(visual_positions)
        # Without visual tokens one text token stands in: K = V = 1 merges nothing, and no graph sees an empty axis.
        positions = visual_positions if self._visual_tokens else np.zeros(1, dtype=np.int64)
        batch, prompt_tokens, _ = prompt_embeddings.shape
        self._axes = {"B": batch, "P": prompt_tokens, "V": len(positions)}
        loaded.check(self._axes)
        self._memory = loaded.borrow(self)
        uploads = [
            loaded.upload(self._memory, "prompt_embeddings", prompt_embeddings, "float32"),
            loaded.upload(self._memory, "visual_positions", positions, "int64"),
        ]
        loaded.run(uploads, recurs=False)

    def _step_axes(self, request: StepRequest) -> dict[str, int]:
        answer_tokens, keep = request.answer_ids.shape[1], max(request.keep, 1)
        return self._axes | {"G": answer_tokens, "S": answer_tokens, "K": keep}

    def _launch(self, name: str, axes: Axes, places: Mapping[str, str] | None = None, profile: int = STEP) -> Launch:
        """The launch of stage ``name``; ``places`` names the buffers of tensors that lie in another than their own."""
        stage = self._loaded.stages[name]
        lying = {**buffers(stage.record.spec, profile), **(places or {})}
        return stage.launch(axes, lambda tensor, size: self._memory.on_device(lying.get(tensor, tensor), size), profile)

    def _begin(self, request: StepRequest, axes: Axes) -> list[Operation]:
        """The step's inputs, and the answer's embeddings from its ids."""
        loaded, memory = self._loaded, self._memory
        operations: list[Operation] = [
            loaded.upload(memory, "token_ids", request.answer_ids, "int64"),
            loaded.upload(memory, "deciders", request.deciders, "bool"),
        ]
        if loaded.needs_selection_scores:
            scores = request.selection_scores
            if scores is None or not self._visual_tokens:
                scores = np.zeros((axes["B"], axes["V"]), dtype=np.float32)
            operations.append(loaded.upload(memory, "selection_scores", scores, "float32"))
        operations.append(self._launch("embed", axes))
        return operations

    def _fetch(self, operations: list[Operation], fetched: Fetched, stage: str, axes: Axes, *names: str) -> None:
        """Let the outputs ``names`` of ``stage`` come down, after what is in ``operations``."""
        for tensor in self._loaded.stages[stage].outputs:
            if tensor.name in names:
                fetch, array = self._loaded.fetch(self._memory, tensor, axes)
                operations.append(fetch)
                fetched.add(tensor, array)

    def _end(self, operations: list[Operation], fetched: Fetched, request: StepRequest, axes: Axes) -> None:
        """The last stage and what is wanted of it."""
        operations.append(self._launch("back", axes))
        stage, outputs = certainty_stage_for(request.certainty, self._loaded.stages.__contains__)
        if stage != "back":
            operations.append(self._launch(stage, axes))
            self._fetch(operations, fetched, stage, axes, *outputs)
        logits = request.logits or "logits" in outputs
        self._fetch(operations, fetched, "back", axes, "token", "doubt", *(["logits"] if logits else []))

    def _result(self, request: StepRequest, fetched: Fetched, kept: Ints | None) -> StepResult:
        return step_result(
            request,
            fetched.__getitem__,
            self._loaded.stages.__contains__,
            self._loaded.language.choices,
            kept,
            shifted=self._shifted,
        )


class UncachedSession(AnswerSession):
    """An answer without KV cache; the prompt's embeddings stay on the device."""

    def step(self, request: StepRequest) -> StepResult:
        axes = self._step_axes(request)
        axes["L"] = axes["P"] + axes["G"]
        axes["M"] = axes["L"] - axes["V"] + axes["K"]
        self._loaded.check(axes)
        fetched = Fetched()
        operations = self._begin(request, axes)
        operations += [self._launch("front", axes), self._launch("merge", axes)]
        if request.merge:
            self._fetch(operations, fetched, "merge", axes, "kept")
        self._end(operations, fetched, request, axes)
        self._loaded.run(operations)
        return self._result(request, fetched, fetched["kept"] if request.merge else None)
