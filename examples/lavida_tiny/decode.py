"""Batched greedy decoding for measurements during training: the low-confidence rule, one token a step, no merging."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d3tom_export.families.lavida_llada import FAMILY
from d3tom_export.model.lavida import Lavida
from d3tom_export.prompt.chat import answer_text

from .batches import ANSWER_TOKENS, Batch, Text
from .packed import answer_questions, answer_single, encode_prefix, prefix_embeddings, visual_tokens
from .questions import Question

MODES = ("packed", "full", "prefix")


def denoise(logits_of: Callable[[Tensor], Tensor], masked: Tensor, mask_id: int) -> Tensor:
    """Fill ``masked`` answers (B, N, G), the most confident position first: (B, N, G) int64."""
    ids = masked
    for _ in range(ANSWER_TOKENS):
        confidence, tokens = logits_of(ids).float().softmax(-1).max(-1)
        chosen = confidence.masked_fill(ids != mask_id, -1).argmax(-1, keepdim=True)
        ids = ids.scatter(-1, chosen, tokens.gather(-1, chosen))
    return ids


@torch.no_grad()
def decode(model: Lavida, text: Text, batch: Batch, mode: str) -> list[list[str]]:
    """Answers to every question of ``batch``; ``mode`` is one of :data:`MODES`, all but "packed" with one question."""
    masked = torch.full_like(batch.answers, text.mask_id)
    with torch.autocast("cpu", torch.bfloat16):
        prefix = prefix_embeddings(model, batch, visual_tokens(model, batch)[0])
        if mode == "packed":
            layers = encode_prefix(model, prefix)
            ids = denoise(lambda ids: answer_questions(model, layers, batch, ids, False), masked, text.mask_id)
        else:
            full = mode == "full"
            ids = denoise(lambda ids: answer_single(model, prefix, batch, ids, full), masked, text.mask_id)
    ends = {text.tokenizer.token_to_id(token) for token in FAMILY.end_tokens}
    return [[answer_text(text.tokenizer, answer, ends) for answer in answers] for answers in ids.tolist()]


def exact_match(pairs: Sequence[tuple[Question, str]]) -> dict[str, float]:
    """Share of right answers, over all questions ("all") and by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in pairs:
        right["all"].append(answer == question.answer)
        right[question.kind].append(answer == question.answer)
    return {kind: sum(values) / len(values) for kind, values in right.items()}
