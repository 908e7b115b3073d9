"""The eager PyTorch model under the common loop: the oracle of every parity check."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from d3tom_export.config import MergeConfig
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, StepRequest, StepResult
from d3tom_export.loop.sampling import certainty_of_logits, softmax64, without_banned
from d3tom_export.merging.cached import (
    LayerCache,
    MergedCache,
    extend,
    forward_cached,
    prefill,
    prefill_merged,
    score_prompt,
)
from d3tom_export.merging.forward import ForwardResult, Merging, forward
from d3tom_export.merging.merge import NEAR_TIE, NearTie
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.precision import witness_model

_MOST_NEAR_TIES = 4
"""Near-ties of a step, the closest ones, whose outcomes are all computed: up to 15 besides the step's own. A backend
that turned a further one fails, though it may be right."""

_ANY_CALL = 2.0
"""The largest difference of two cosine similarities: every token's call is as close."""


class PyTorchSession:
    """One answer on the eager model; with ``kv_cache`` the prompt runs once and its keys and values are kept.

    With ``prompt_merge`` it is merged as it runs, and every step holds that merge. Of the prompt, ``shared_rows`` are
    prefilled, and merged, alone; the rest runs over their cache.
    """

    def __init__(
        self,
        model: Lavida,
        merge: MergeConfig,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        kv_cache: bool,
        turns_closest: bool = False,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> None:
        self._model, self._merge = model, merge
        self._near_tie, self._most = (_ANY_CALL, 1) if turns_closest else (NEAR_TIE, _MOST_NEAR_TIES)
        self._dtype = model.transformer.wte.weight.dtype
        self._prompt = torch.from_numpy(prompt_embeddings).to(self._dtype)
        # Rows that are prefilled by themselves: all of the prompt, or its prefix.
        self._prefix, self._rest = self._prompt, None
        if shared_rows:
            self._prefix, self._rest = self._prompt[:, :shared_rows], self._prompt[:, shared_rows:]
        self._visual_positions = torch.from_numpy(visual_positions)
        self._cache: list[LayerCache] | None = None
        self.first_token: Ints | None = None
        self._held: list[MergedCache] = []
        if kv_cache:
            with torch.inference_mode():
                if prompt_merge is None:
                    self._cache, logits = prefill(model.transformer, self._prefix)
                    if self._rest is not None:
                        self._cache, logits = extend(model.transformer, self._cache, self._rest)
                else:
                    logits = self._merge_prompt(prompt_merge)
            if logits is not None:
                self.first_token = self._likeliest(logits.float().numpy())[1][:, 0]

    def _merge_prompt(self, request: PromptMerge) -> torch.Tensor | None:
        """Prefill and merge the prompt, with the outcomes of near-ties where logits will be compared.

        Returns the first token's logits, as the prefill does.
        """
        transformer = self._model.transformer
        answer = self._model.embed_tokens(torch.from_numpy(request.answer_ids))
        merging = self._merging(request)
        if request.logits:
            merging = merging._replace(find_near_ties=True, near_tie=self._near_tie)
        scored = score_prompt(transformer, self._prefix, answer, merging)
        self._cache = scored.cache
        runs = [prefill_merged(transformer, scored)]
        runs += [prefill_merged(transformer, scored, turned) for turned in self._turned(runs[0].merged.near_ties)]
        self._held = [run.merged for run in runs]
        if self._rest is None:
            return runs[0].logits
        whole = [extend(transformer, [*scored.cache, *merged.caches], self._rest) for merged in self._held]
        early = len(scored.cache)
        self._cache = whole[0].cache[:early]
        self._held = [
            merged._replace(caches=extended.cache[early:]) for merged, extended in zip(self._held, whole, strict=True)
        ]
        return whole[0].logits

    def _turned(self, near_ties: tuple[NearTie, ...]) -> list[tuple[NearTie, ...]]:
        """The sets of ``near_ties``, the closest of them, that may have gone the other way."""
        ties = near_ties[: self._most]
        return [turned for count in range(1, len(ties) + 1) for turned in combinations(ties, count)]

    def _results(self, request: StepRequest, answer: torch.Tensor) -> list[ForwardResult]:
        """The step's result, and what it had been with near-ties gone the other way (where logits are compared).

        With a KV cache the merged caches of all outcomes are held, for steps that merge nothing anew.
        """
        transformer = self._model.transformer
        if self._held and request.merge and request.cache_merge == "held":
            assert self._cache is not None
            return [forward_cached(transformer, self._cache, answer, held=held)[0] for held in self._held]

        def run(merging: Merging | None) -> tuple[ForwardResult, MergedCache | None]:
            if self._cache is not None:
                return forward_cached(transformer, self._cache, answer, merging)
            sequence = torch.cat([self._prompt, answer], dim=1)
            return forward(transformer, sequence, answer.shape[1], merging), None

        merging = self._merging(request) if request.merge else None
        if merging is None or not request.logits:
            runs = [run(merging)]
        else:
            runs = [run(merging._replace(find_near_ties=True, near_tie=self._near_tie))]
            runs += [run(merging._replace(turned=turned)) for turned in self._turned(runs[0][0].near_ties)]
        self._held = [merged for _, merged in runs if merged is not None]
        return [result for result, _ in runs]

    @torch.inference_mode()
    def step(self, request: StepRequest) -> StepResult:
        answer = self._model.embed_tokens(torch.from_numpy(request.answer_ids))
        result, *others = self._results(request, answer)
        logits = result.logits.float().numpy()
        allowed, token = self._likeliest(logits)
        confidence = np.take_along_axis(softmax64(allowed), token[..., None], axis=-1)[..., 0]
        return StepResult(
            token=token,
            confidence=confidence,
            kept=None if result.kept is None else result.kept.numpy(),
            logits=logits if request.logits else None,
            scores=None if result.scores is None else result.scores.numpy(),
            alternative_logits=tuple(other.logits.float().numpy() for other in others),
            choices=self._model.config.language.choices,
            certainty=certainty_of_logits(request.certainty, allowed) if request.certainty else None,
        )

    def _likeliest(self, logits: Floats) -> tuple[Floats, Ints]:
        """``logits`` (B, S, rows of the head) without banned columns, and the likeliest tokens (B, S)."""
        choices = self._model.config.language.choices
        allowed = without_banned(logits, choices)
        return allowed, allowed[..., : choices.rows].argmax(axis=-1)

    def _merging(self, request: StepRequest | PromptMerge) -> Merging:
        scores = request.selection_scores
        return Merging(
            config=self._merge,
            deciders=torch.from_numpy(request.deciders),
            visual_positions=self._visual_positions,
            keep=request.keep,
            selection_scores=None if scores is None else torch.from_numpy(scores),
        )


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PyTorchBackend:
    """The oracle. ``merge`` fixes the layer and the kind of merge; the loop decides when and how much.

    It computes in the precision of ``model``'s weights. Where logits are compared its steps have alternatives: what
    near-ties of the merge would have made of them, or with ``turns_closest`` what the closest call of all tokens would.
    """

    name = "pytorch"

    def __init__(
        self, model: Lavida, merge: MergeConfig, *, kv_cache: bool = False, turns_closest: bool = False
    ) -> None:
        if kv_cache:
            merge.check_cached()
        self.kv_cache = kv_cache
        self._turns_closest = turns_closest
        self._model, self._merge = model, merge
        self.shares_prefix = kv_cache
        dtype = model.transformer.wte.weight.dtype
        self.precision = next(name for name, known in PRECISIONS.items() if known == dtype)

    @torch.inference_mode()
    def embed_tokens(self, token_ids: Ints) -> Floats:
        return self._model.embed_tokens(torch.from_numpy(token_ids)).float().numpy()

    @torch.inference_mode()
    def encode_views(self, pixel_values: Floats) -> Floats:
        dtype = self._model.transformer.wte.weight.dtype
        return self._model.encode_views(torch.from_numpy(pixel_values).to(dtype)).float().numpy()

    @property
    def image_newline(self) -> NDArray[np.float32]:
        return self._model.model.image_newline.detach().float().numpy()

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> PyTorchSession:
        """Begin an answer to ``prompt_embeddings`` (B, P, D) float32, visual tokens at ``visual_positions`` (V,).

        ``prompt_merge`` and ``shared_rows`` are for the loop with a KV cache; any layer and kind of merge will do here.
        The rows that are shared run anew for every answer: the oracle remembers nothing.
        """
        return PyTorchSession(
            self._model,
            self._merge,
            prompt_embeddings,
            visual_positions,
            self.kv_cache,
            self._turns_closest,
            prompt_merge,
            shared_rows,
        )

    def witness(self, precision: str) -> PyTorchBackend:
        """The same weights without the roundings of fp16 or bf16, with those of int8, or without those of the inputs of
        products, which fp32 stands for (parity/bounds.py)."""
        model = witness_model(self._model, precision)
        return PyTorchBackend(model, self._merge, kv_cache=self.kv_cache, turns_closest=True)
