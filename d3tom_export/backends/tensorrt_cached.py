"""The loop with a KV cache on engines that hold each weight once (:mod:`d3tom_export.engines.stages`).

The prompt runs through `front`, `decide` and `back` in their prompt profile, which leaves every layer's keys and values
where the merge reads them. A step runs the same engines in the other profile, and `merge` on the caches where due. The
contract's stages are cut otherwise; :func:`engines_of` says on which engines each of them runs.

A prompt that is merged at its prefill runs through `front` and `decide`, the answer's mask rows after it through the
same two, `prompt_merge` merges it onto what they keep, and `back` runs what is left.

B batch, G answer tokens, P prompt, V visual tokens, K kept, C = P - V + K, N key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d3tom_export.backends.tensorrt_loaded import LoadedEngines
from d3tom_export.backends.tensorrt_runner import Operation
from d3tom_export.backends.tensorrt_sessions import AnswerSession, Fetched
from d3tom_export.engines.stages import PROMPT, PROMPT_DECIDERS, PROMPT_ENGINES, STEP, buffers, prompt_sizes
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, StepRequest, StepResult
from d3tom_export.loop.prompt_merge import best_of

_ATTENTION = ("attention_keys", "attention_values")
_FRONT, _BACK = ("front", "decide"), ("back",)
"""Of :data:`PROMPT_ENGINES`, those before and behind a merge at the prefill."""
_OF_PROMPT = {"prefill": PROMPT_ENGINES, "prompt_front": _FRONT, "prompt_back": _BACK}
"""The engines that are a stage of the contract's in the prompt's profile."""


def engines_of(stage: str, engines: Sequence[str]) -> list[tuple[str, int]]:
    """The engines, each with its profile, that do in order what the contract's ``stage`` of this loop does.

    ``engines`` are those that there are: where no layer follows l*, there is no cache to merge.
    """
    if stage in _OF_PROMPT:
        return [(name, PROMPT) for name in _OF_PROMPT[stage]]
    names = ("decide", "merge") if stage == "merge" else (stage,)
    return [(name, STEP) for name in names if name in engines]


class CachedSession(AnswerSession):
    """An answer with the prompt's keys and values kept on the device.

    Held from one answer to the next: every layer's cache token by token, which the merge reads for the layers behind
    l*, and every layer's in attention's form. For the layers behind l* that form lies where their merged rows go, which
    are fewer: the first step, which merges nothing, is the only one to read it. So buffers are as large as the prompt
    asks for and stay where they are, whatever K does. Bytes, at e bytes an element: 4*B*P*N*d*e a layer; behind l* of a
    prompt that ``prompt_merge`` merges at its prefill, C in place of P.
    """

    def __init__(
        self,
        loaded: LoadedEngines,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        prompt_merge: PromptMerge | None = None,
    ) -> None:
        super().__init__(loaded, prompt_embeddings, visual_positions)
        if prompt_merge is not None:
            loaded.merge.check_built_for_prefill()
        layers, self._layer = loaded.language.n_layers, loaded.merge.layer
        self._later = range(self._layer + 1, layers)
        self._shifted = loaded.language.row_shift
        self._whole = True
        """Whether the later layers' buffers hold the unmerged cache."""
        self._kept = np.zeros((self._axes["B"], 0), dtype=np.int64)
        """What was merged, or decided where nothing was."""
        nobody = np.zeros((self._axes["B"], self._axes["P"]), dtype=np.bool_)
        prompt: list[Operation] = [loaded.upload(self._memory, PROMPT_DECIDERS, nobody, "bool")]
        if prompt_merge is not None and prompt_merge.keep < self._visual_tokens:
            self._merge_prompt(prompt, prompt_merge)
            return
        self._run_prompt(prompt, PROMPT_ENGINES, self._axes["P"])
        for layer in range(layers):
            self._rotate(layer, self._axes["P"])

    def _run_prompt(
        self, operations: list[Operation], engines: Sequence[str], rows: int, *, merges_prompt: bool = False
    ) -> None:
        """Run ``operations``, and the prompt's ``rows`` through ``engines``; wait for the last of a prompt's."""
        loaded, axes, fetched = self._loaded, prompt_sizes({**self._axes, "P": rows}), Fetched()
        loaded.check(axes, engines, PROMPT)
        for name in engines:
            places = buffers(loaded.stages[name].record.spec, PROMPT, merges_prompt=merges_prompt)
            operations.append(self._launch(name, axes, places, PROMPT))
        if "back" not in engines:
            loaded.enqueue(operations, recurs=False)
            return
        if self._shifted:  # the head's one row is the prompt's last, which predicts the answer's first token
            self._fetch(operations, fetched, "back", axes, "token")
        loaded.run(operations, recurs=False)
        if self._shifted:
            self.first_token = fetched["token"][:, 0]

    def _merge_prompt(self, prompt: list[Operation], request: PromptMerge) -> None:
        """Prefill the prompt, after the operations ``prompt``, and merge it on the way as ``request`` says; K < V."""
        loaded, memory = self._loaded, self._memory
        rows, answer_tokens = self._axes["P"] - self._axes["V"] + request.keep, request.answer_ids.shape[1]
        axes = self._axes | {"K": request.keep, "C": rows, "G": answer_tokens, "S": answer_tokens}
        # As each step will, and what comes after the mask rows: refused before anything runs.
        loaded.check(axes)
        loaded.check(prompt_sizes(self._axes | {"P": rows}), _BACK, PROMPT)
        loaded.check({"B": axes["B"], "P": rows}, ["rotate"])
        self._run_prompt(prompt, _FRONT, self._axes["P"], merges_prompt=True)
        for layer in range(self._layer + 1):
            self._rotate(layer, self._axes["P"])
        operations: list[Operation] = []
        if request.selection_scores is not None:
            self._kept = best_of(request.selection_scores, request.keep)
            operations.append(loaded.upload(memory, "kept", self._kept, "int64"))
        else:
            fetched = Fetched()
            operations.append(loaded.upload(memory, "token_ids", request.answer_ids, "int64"))
            operations.append(loaded.upload(memory, "deciders", request.deciders, "bool"))
            operations += [self._launch(name, axes) for name in ("embed", *_FRONT)]
            self._fetch(operations, fetched, "decide", axes, "kept")
            loaded.run(operations, recurs=False)
            self._kept, operations = fetched["kept"], []
        operations.append(self._launch("prompt_merge", axes))
        self._run_prompt(operations, _BACK, rows, merges_prompt=True)
        for layer in self._later:
            self._rotate(layer, rows)
        self._whole = False

    def _rotate(self, layer: int, rows: int) -> None:
        """Put ``layer``'s cache into attention's form: never part of a graph, since it runs once for each layer."""
        kind = "merged" if layer in self._later else "attention"
        places = {name: name.replace("attention", kind) + f"_{layer}" for name in _ATTENTION}
        places |= {name: f"{name}_{layer}" for name in ("keys", "values")}
        self._loaded.enqueue([self._launch("rotate", self._axes | {"P": rows}, places)], recurs=False)

    def step(self, request: StepRequest) -> StepResult:
        axes = self._step_axes(request)
        drops = request.merge and request.keep < self._visual_tokens
        axes["C"] = axes["P"] - axes["V"] + axes["K"] if drops else axes["P"]
        self._loaded.check(axes)
        anew = drops and request.cache_merge == "anew"
        if not drops and not self._whole:
            for layer in self._later:
                self._rotate(layer, axes["P"])
            self._whole = True

        fetched = Fetched()
        operations = [*self._begin(request, axes), self._launch("front", axes), self._launch("decide", axes)]
        held = drops and request.cache_merge == "held"
        if not held:
            self._fetch(operations, fetched, "decide", axes, "kept")
        if drops and request.cache_merge == "if-changed":
            # The one choice that the host has to make in the middle of a step.
            self._loaded.run(operations)
            operations = []
            anew = not np.array_equal(fetched["kept"], self._kept)
        if anew and self._later:
            operations.append(self._launch("merge", axes))
        self._end(operations, fetched, request, axes)
        self._loaded.run(operations)
        if anew:
            self._whole = False
        if anew or not drops:
            self._kept = fetched["kept"]
        return self._result(request, fetched, self._kept if request.merge else None)
