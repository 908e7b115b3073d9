"""Answers in progress on ONNX Runtime: the loop without a KV cache, and the one with it.

B batch, P prompt, G answer tokens, V visual tokens, K kept, C = P - V + K, N key/value heads, d head size.
"""

from __future__ import annotations

import numpy as np

from d3tom_export.backends.onnxruntime_loaded import LoadedStages
from d3tom_export.backends.onnxruntime_package import ort
from d3tom_export.loop.answer_rows import certainty_stage_for, step_result
from d3tom_export.loop.denoise import Floats, Ints, StepRequest, StepResult

_ATTENTION = ("attention_keys", "attention_values")


class _Session:
    """What both loops need of an answer: the visual positions, and the last stage's outputs as a result."""

    first_token: Ints | None = None
    _shifted = False
    """Whether rows are the next slot's (:func:`~d3tom_export.loop.answer_rows.step_result`)."""

    def __init__(self, loaded: LoadedStages, visual_positions: Ints) -> None:
        self._loaded = loaded
        self._visual_tokens = len(visual_positions)
        # Without visual tokens one text token stands in: K = V = 1 merges nothing, and no graph sees an empty axis.
        positions = visual_positions if self._visual_tokens else np.zeros(1, dtype=np.int64)
        self._visual_positions = loaded.on_device(positions)

    def _embed(self, request: StepRequest) -> ort.OrtValue:
        loaded = self._loaded
        return loaded.stages["embed"].run({"token_ids": loaded.on_device(request.answer_ids)}, ["embeddings"])[0]

    def _selection(self, request: StepRequest) -> dict[str, ort.OrtValue]:
        return {
            "deciders": self._loaded.on_device(request.deciders),
            "visual_positions": self._visual_positions,
            "keep": self._loaded.on_host(np.array([max(request.keep, 1)], dtype=np.int64)),
        }

    def _result(self, request: StepRequest, inputs: dict[str, ort.OrtValue], kept: Ints | None) -> StepResult:
        """Run the last stage."""
        stages = self._loaded.stages
        stage, outputs = certainty_stage_for(request.certainty, stages.__contains__)
        wanted = ["token", "doubt", *(["logits"] if request.logits or outputs else [])]
        values = dict(zip(wanted, stages["back"].run(inputs, wanted), strict=True))
        if stage != "back":
            more = stages[stage].run({"logits": values["logits"]}, outputs)
            values |= dict(zip(outputs, more, strict=True))
        return step_result(
            request,
            lambda name: values[name].numpy(),
            stages.__contains__,
            self._loaded.language.choices,
            kept,
            shifted=self._shifted,
        )


class UncachedSession(_Session):
    """An answer without KV cache; the prompt's embeddings stay on the device."""

    def __init__(self, loaded: LoadedStages, prompt_embeddings: Floats, visual_positions: Ints) -> None:
        super().__init__(loaded, visual_positions)
        self._prompt = loaded.on_device(prompt_embeddings)

    def step(self, request: StepRequest) -> StepResult:
        loaded, stages = self._loaded, self._loaded.stages
        batch, answer_tokens = request.answer_ids.shape
        answer = self._embed(request)
        (hidden,) = stages["front"].run({"prompt_embeddings": self._prompt, "answer_embeddings": answer}, ["hidden"])
        merge_inputs = {"hidden": hidden, **self._selection(request)}
        if loaded.needs_selection_scores:
            scores = request.selection_scores
            if scores is None or not self._visual_tokens:
                scores = np.zeros((batch, max(self._visual_tokens, 1)), dtype=np.float32)
            merge_inputs["selection_scores"] = loaded.on_device(scores)
        merge_outputs = ["merged", "kept", *(["positions"] if loaded.keeps_positions else [])]
        merged = dict(zip(merge_outputs, stages["merge"].run(merge_inputs, merge_outputs), strict=True))

        back_inputs = {"merged": merged["merged"], "answer_length": loaded.on_host(np.array([answer_tokens]))}
        if loaded.keeps_positions:
            back_inputs["positions"] = merged["positions"]
        return self._result(request, back_inputs, merged["kept"].numpy() if request.merge else None)


class CachedSession(_Session):
    """An answer with the prompt's keys and values kept on the device; no step copies them, but for the fused attention
    of the CPU's graphs, whose kernel puts old and new rows together.

    Held for the whole answer: layers 0..l* in attention's form, and the later layers as the merge reads them (where
    ``merges``; else in attention's form too). A merge writes C rows per later layer into buffers that serve until C
    changes. The first step, which merges nothing, needs the later layers in attention's form once; that form goes with
    the first merge. So memory does not grow with the steps.
    """

    def __init__(self, loaded: LoadedStages, prompt_embeddings: Floats, visual_positions: Ints, merges: bool) -> None:
        super().__init__(loaded, visual_positions)
        language, self._layer = loaded.language, loaded.merge.layer
        self._later = range(self._layer + 1, language.n_layers)
        batch, prompt_tokens, _ = prompt_embeddings.shape
        self._text_tokens = prompt_tokens - self._visual_tokens
        self._rows_shape = (batch, prompt_tokens, language.n_kv_heads, language.head_size)
        prefill = loaded.stages["prefill"]
        names = [f"{kind}_{layer}" for layer in range(language.n_layers) for kind in ("keys", "values")]
        self._tokens = {name: prefill.empty(name, self._rows_shape) for name in names}
        self._shifted = language.row_shift
        first = ["first_token"] if self._shifted else []
        inputs = {"prompt_embeddings": loaded.on_device(prompt_embeddings)}
        found = prefill.run(inputs, first, into=self._tokens, shrink=True)
        if self._shifted:
            self.first_token = found[0].numpy()[:, 0]
        self._attention: dict[str, ort.OrtValue] = {}
        for layer in range(language.n_layers):
            self._rotate(layer)
            if not merges or layer not in self._later:
                del self._tokens[f"keys_{layer}"], self._tokens[f"values_{layer}"]
        self._merged: dict[str, ort.OrtValue] = {}
        self._merged_rows = 0
        self._kept = np.zeros((batch, 0), dtype=np.int64)

    def _rotate(self, layer: int) -> None:
        """Put ``layer``'s cache into attention's form as well."""
        batch, prompt_tokens, heads, size = self._rows_shape
        stage = self._loaded.stages["rotate"]
        values = {name: stage.empty(name, (batch, heads, prompt_tokens, size)) for name in _ATTENTION}
        tokens = {name: self._tokens[f"{name}_{layer}"] for name in ("keys", "values")}
        stage.run(tokens, into=values)
        self._attention |= {f"{name}_{layer}": value for name, value in values.items()}

    def _of(self, layer: int) -> dict[str, ort.OrtValue]:
        return {f"{name}_{layer}": self._attention[f"{name}_{layer}"] for name in _ATTENTION}

    def step(self, request: StepRequest) -> StepResult:
        stages = self._loaded.stages
        front_inputs = {"answer_embeddings": self._embed(request)}
        for layer in range(self._layer):
            front_inputs |= self._of(layer)
        (hidden,) = stages["front"].run(front_inputs, ["hidden"])
        inputs = {"hidden": hidden, **self._selection(request), **self._of(self._layer)}

        drops = request.merge and request.keep < self._visual_tokens
        if drops and request.cache_merge == "anew":
            merged = self._merge(inputs, request)
        else:
            merged, kept = stages["decide"].run(inputs, ["merged", "kept"])
            decided = kept.numpy()
            if drops and request.cache_merge == "if-changed" and not np.array_equal(decided, self._kept):
                merged = self._merge(inputs, request)
            elif not drops:
                self._kept = decided
        back_inputs = {"merged": merged, **(self._merged if drops else self._unmerged())}
        return self._result(request, back_inputs, self._kept if request.merge else None)

    def _unmerged(self) -> dict[str, ort.OrtValue]:
        """The later layers' full caches, under the names that `back` has for merged ones."""
        inputs: dict[str, ort.OrtValue] = {}
        for layer in self._later:
            if f"{_ATTENTION[0]}_{layer}" not in self._attention:
                self._rotate(layer)
            inputs |= {name.replace("attention", "merged"): value for name, value in self._of(layer).items()}
        return inputs

    def _merge(self, inputs: dict[str, ort.OrtValue], request: StepRequest) -> ort.OrtValue:
        """Merge the later layers' caches onto what the deciders keep; returns the answer's rows after l*."""
        batch, _, heads, size = self._rows_shape
        for layer in self._later:
            for name in _ATTENTION:
                self._attention.pop(f"{name}_{layer}", None)
        stage = self._loaded.stages["merge"]
        rows = self._text_tokens + request.keep
        if rows != self._merged_rows:
            self._merged.clear()  # before the new ones are there: the two need not fit together
            names = [f"merged_{kind}_{layer}" for layer in self._later for kind in ("keys", "values")]
            self._merged = {name: stage.empty(name, (batch, heads, rows, size)) for name in names}
            self._merged_rows = rows
        merged, kept = stage.run(inputs | self._tokens, ["merged", "kept"], into=self._merged)
        self._kept = kept.numpy()
        if request.last_merge:
            self._tokens.clear()
        return merged
