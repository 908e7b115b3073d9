"""Answers in progress on ONNX Runtime: the loop without a KV cache, and the one with it.

B batch, P prompt, S rest of one behind a shared prefix, G answer tokens, V visual tokens, K kept, C = P - V + K,
N key/value heads, d head size.
"""

from __future__ import annotations

import numpy as np

from d3tom_export.backends.onnxruntime_loaded import LoadedStages
from d3tom_export.backends.onnxruntime_package import ort
from d3tom_export.backends.onnxruntime_prefixes import Prefix, PrefixStore, prefix_key
from d3tom_export.loop.answer_rows import certainty_stage_for, step_result
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, StepRequest, StepResult
from d3tom_export.loop.prompt_merge import best_of
from d3tom_export.stages.contract import extended_caches

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

    def _embed(self, request: StepRequest | PromptMerge) -> ort.OrtValue:
        loaded = self._loaded
        return loaded.stages["embed"].run({"token_ids": loaded.on_device(request.answer_ids)}, ["embeddings"])[0]

    def _selection(self, request: StepRequest | PromptMerge) -> dict[str, ort.OrtValue]:
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


class _Prompt(_Session):
    """A prompt's rows, or its prefix's, on their way through the loop with a KV cache, and what they leave.

    That is held token by token, as the merge reads it, and in attention's form, as layers read it.
    """

    def __init__(self, loaded: LoadedStages, visual_positions: Ints, batch: int, rows: int) -> None:
        super().__init__(loaded, visual_positions)
        language, self._layer = loaded.language, loaded.merge.layer
        self._later = range(self._layer + 1, language.n_layers)
        self._batch, self._prompt_tokens = batch, rows
        self._text_tokens = rows - self._visual_tokens
        self._shifted = language.row_shift
        self._tokens: dict[str, ort.OrtValue] = {}
        self._attention: dict[str, ort.OrtValue] = {}
        self._kept = np.zeros((batch, 0), dtype=np.int64)

    def prefix(self, prompt_embeddings: Floats, request: PromptMerge | None) -> Prefix:
        """What the rows (B, P, D) leave to those behind them, merged as ``request`` says."""
        if request is None:
            self._prefill(prompt_embeddings)
        else:
            self._merge_prompt(prompt_embeddings, request, lets_go=False)
        return Prefix({name: np.array(value.numpy()) for name, value in self._tokens.items()}, self._kept.copy())

    def _prefill(self, prompt_embeddings: Floats) -> None:
        """Run the rows (B, P, D) through all layers, nothing merged; the keys and values are held token by token."""
        loaded = self._loaded
        if "prefill" in loaded.stages:
            layers = range(loaded.language.n_layers)
            self._run_prompt("prefill", {"prompt_embeddings": loaded.on_device(prompt_embeddings)}, layers)
            return
        hidden = self._run_front(prompt_embeddings)
        every = np.tile(np.arange(max(self._visual_tokens, 1)), (self._batch, 1))
        self._run_prompt("prompt_back", {"prompt_merged": self._shorten(hidden, every)}, self._later)

    def _run_prompt(self, name: str, inputs: dict[str, ort.OrtValue], layers: range, rows: int | None = None) -> None:
        """Stage ``name``, the last of a prompt's, which leaves ``rows`` (None: P) tokens of ``layers``."""
        stage, first = self._loaded.stages[name], ["first_token"] if self._shifted else []
        new = self._room(name, layers, rows or self._prompt_tokens)
        self._tokens |= new
        found = stage.run(inputs, first, into=new, shrink=True)
        if self._shifted:
            self.first_token = found[0].numpy()[:, 0]

    def _room(self, name: str, layers: range, rows: int) -> dict[str, ort.OrtValue]:
        """Room for what stage ``name`` gives of ``layers``, token by token."""
        language, stage = self._loaded.language, self._loaded.stages[name]
        shape = (self._batch, rows, language.n_kv_heads, language.head_size)
        names = [f"{kind}_{layer}" for layer in layers for kind in ("keys", "values")]
        return {each: stage.empty(each, shape) for each in names}

    def _drop_tokens(self, layer: int) -> None:
        for name in ("keys", "values"):
            self._tokens.pop(f"{name}_{layer}", None)

    def _run_front(self, prompt_embeddings: Floats) -> ort.OrtValue:
        """The prompt (B, P, D) up to layer l*: the layer's input; the caches so far are held."""
        into = self._room("prompt_front", range(self._layer + 1), self._prompt_tokens)
        self._tokens |= into
        inputs = {"prompt_embeddings": self._loaded.on_device(prompt_embeddings)}
        return self._loaded.stages["prompt_front"].run(inputs, ["prompt_hidden"], into=into, shrink=True)[0]

    def _shorten(self, hidden: ort.OrtValue, kept: Ints) -> ort.OrtValue:
        """Layer l* on the prompt, its visual tokens merged onto the ``kept`` (B, K): (B, C, D)."""
        inputs = {
            "prompt_hidden": hidden,
            "visual_positions": self._visual_positions,
            "kept": self._loaded.on_device(kept),
        }
        return self._loaded.stages["prompt_merge"].run(inputs, ["prompt_merged"], shrink=True)[0]

    def _merge_prompt(self, prompt_embeddings: Floats, request: PromptMerge, *, lets_go: bool) -> None:
        """Prefill the prompt and merge it on the way, as ``request`` says; K < V.

        All keys and values are held token by token, unless it ``lets_go`` those of layers 0..l*, which are held in
        attention's form too.
        """
        hidden = self._run_front(prompt_embeddings)
        for layer in range(self._layer + 1):
            self._rotate(layer)
            if lets_go:
                self._drop_tokens(layer)
        if request.selection_scores is not None:
            self._kept = best_of(request.selection_scores, request.keep)
        else:
            inputs = self._layer_inputs(request)
            self._kept = self._loaded.stages["decide"].run(inputs, ["kept"], shrink=True)[0].numpy()
        short, rows = self._shorten(hidden, self._kept), self._text_tokens + request.keep
        del hidden
        self._run_prompt("prompt_back", {"prompt_merged": short}, self._later, rows)

    def _rotated(self, layer: int, kind: str, rows: int) -> dict[str, ort.OrtValue]:
        """``layer``'s tokens, so many ``rows``, in attention's form, under the names of tensors of ``kind``."""
        language, stage = self._loaded.language, self._loaded.stages["rotate"]
        shape = (self._batch, language.n_kv_heads, rows, language.head_size)
        values = {name: stage.empty(name, shape) for name in _ATTENTION}
        stage.run({name: self._tokens[f"{name}_{layer}"] for name in ("keys", "values")}, into=values)
        return {f"{name.replace('attention', kind)}_{layer}": value for name, value in values.items()}

    def _rotate(self, layer: int) -> None:
        """Put ``layer``'s cache into attention's form as well, unless it is."""
        if f"{_ATTENTION[0]}_{layer}" not in self._attention:
            self._attention |= self._rotated(layer, "attention", self._prompt_tokens)

    def _of(self, layer: int) -> dict[str, ort.OrtValue]:
        return {f"{name}_{layer}": self._attention[f"{name}_{layer}"] for name in _ATTENTION}

    def _layer_inputs(self, request: StepRequest | PromptMerge) -> dict[str, ort.OrtValue]:
        """The inputs of layer l* for the answer's rows, which `front` is run for."""
        front_inputs = {"answer_embeddings": self._embed(request)}
        for layer in range(self._layer):
            front_inputs |= self._of(layer)
        (hidden,) = self._loaded.stages["front"].run(front_inputs, ["hidden"])
        return {"hidden": hidden, **self._selection(request), **self._of(self._layer)}


class CachedSession(_Prompt):
    """An answer with the prompt's keys and values kept on the device; no step copies them, but for the fused attention
    of the CPU's graphs, whose kernel puts old and new rows together.

    Held for the whole answer: layers 0..l* in attention's form, and the later layers as the merge reads them (where
    ``merges``; else in attention's form too). A merge writes C rows per later layer into buffers that serve until C
    changes. The first step, which merges nothing, needs the later layers in attention's form once; that form goes with
    the first merge. So memory does not grow with the steps.

    Where ``prompt_merge`` merges the prompt as it is prefilled, the later layers' C rows are all that there ever is of
    them.

    Of a prompt whose first ``shared_rows`` are shared, those run alone unless ``prefixes`` has them, and the rest runs
    over them. Both are put together, on the host, in buffers of this answer's own.
    """

    def __init__(
        self,
        loaded: LoadedStages,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        merges: bool,
        prompt_merge: PromptMerge | None,
        shared_rows: int,
        prefixes: PrefixStore,
    ) -> None:
        batch, rows, _ = prompt_embeddings.shape
        super().__init__(loaded, visual_positions, batch, rows)
        self._merged: dict[str, ort.OrtValue] = {}
        self._merged_rows = 0
        if prompt_merge is not None:
            loaded.merge.check_built_for_prefill()
            merges = False
        if prompt_merge is not None and prompt_merge.keep == self._visual_tokens:
            prompt_merge = None
        if shared_rows:
            shared = prompt_embeddings[:, :shared_rows]
            key = prefix_key(shared, visual_positions, prompt_merge)
            prefix = prefixes.get(key)
            if prefix is None:
                prefix = _Prompt(loaded, visual_positions, batch, shared_rows).prefix(shared, prompt_merge)
                prefixes.keep(key, prefix)
            self._extend(prefix, prompt_embeddings[:, shared_rows:])
        elif prompt_merge is not None:
            self._merge_prompt(prompt_embeddings, prompt_merge, lets_go=True)
        else:
            self._prefill(prompt_embeddings)
        if prompt_merge is not None:
            self._merged_rows = self._text_tokens + prompt_merge.keep
        for layer in range(loaded.language.n_layers):
            if layer in self._later and prompt_merge is not None:
                self._merged |= self._rotated(layer, "merged", self._merged_rows)
            else:
                self._rotate(layer)
            if not merges or layer not in self._later:
                self._drop_tokens(layer)

    def _extend(self, prefix: Prefix, rest_embeddings: Floats) -> None:
        """Run the rest of the prompt (B, S, D) over its prefix; keys and values of both are held token by token."""
        loaded, stage = self._loaded, self._loaded.stages["extend"]
        self._kept = prefix.kept
        self._tokens = {name: loaded.on_device(array) for name, array in prefix.tokens.items()}
        inputs = {"prompt_embeddings": loaded.on_device(rest_embeddings)}
        for layer, merged in extended_caches(loaded.language, loaded.merge).items():
            rows = prefix.tokens[f"keys_{layer}"].shape[1]
            inputs |= self._rotated(layer, "merged" if merged else "attention", rows)
        new = self._room("extend", range(loaded.language.n_layers), rest_embeddings.shape[1])
        found = stage.run(inputs, ["first_token"] if self._shifted else [], into=new, shrink=True)
        if self._shifted:
            self.first_token = found[0].numpy()[:, 0]
        del inputs
        for name, value in new.items():
            self._tokens[name] = loaded.on_device(np.concatenate([prefix.tokens[name], value.numpy()], axis=1))

    def step(self, request: StepRequest) -> StepResult:
        stages = self._loaded.stages
        inputs = self._layer_inputs(request)
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
            self._rotate(layer)
            inputs |= {name.replace("attention", "merged"): value for name, value in self._of(layer).items()}
        return inputs

    def _merge(self, inputs: dict[str, ort.OrtValue], request: StepRequest) -> ort.OrtValue:
        """Merge the later layers' caches onto what the deciders keep; returns the answer's rows after l*."""
        language = self._loaded.language
        for layer in self._later:
            for name in _ATTENTION:
                self._attention.pop(f"{name}_{layer}", None)
        stage = self._loaded.stages["merge"]
        rows = self._text_tokens + request.keep
        if rows != self._merged_rows:
            self._merged.clear()  # before the new ones are there: the two need not fit together
            names = [f"merged_{kind}_{layer}" for layer in self._later for kind in ("keys", "values")]
            shape = (self._batch, language.n_kv_heads, rows, language.head_size)
            self._merged = {name: stage.empty(name, shape) for name in names}
            self._merged_rows = rows
        merged, kept = stage.run(inputs | self._tokens, ["merged", "kept"], into=self._merged)
        self._kept = kept.numpy()
        if request.last_merge:
            self._tokens.clear()
        return merged
