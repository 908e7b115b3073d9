"""The eager prefill that merges, against a plain restatement: one pass under a mask that hides the answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import StepRecord, uniform_selection_scores
from d3tom_export.loop.prompt_merge import prompt_merge
from d3tom_export.merging import merge as merge_module
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import LladaBlock, rotate
from d3tom_export.pipeline import run_loop
from tests.merging.test_forward import MASK, prompts_of

VISUAL = np.concatenate([np.arange(3, 12), np.arange(15, 26)])
"""Two pictures apart."""
SUFFIX = (5, 9, 11)


def shifted(model: Lavida) -> Lavida:
    """``model`` with a row shift."""
    other = copy.deepcopy(model)
    other.transformer.config = replace(other.transformer.config, row_shift=True)
    return other


def answer(
    model: Lavida, merge: MergeConfig, generation: GenerationConfig, prompts: np.ndarray, visual: np.ndarray = VISUAL
) -> list[StepRecord]:
    backend = PyTorchBackend(model, merge, kv_cache=True)
    return list(run_loop(backend, Prompt(prompts, visual), MASK, generation, merge, logits=True))


def _attention(block: LladaBlock, x: Tensor, prompt_rows: int, model: Lavida) -> tuple[Tensor, Tensor]:
    """Attention output (L, D) and probabilities (H, L, L) of one row's ``x`` (L, D): no prompt row sees the answer."""
    length = len(x)
    heads = block.project(block.attn_norm(x)[None])
    rotary = model.transformer.rotary(torch.arange(length))
    shared = block.n_heads // block.n_kv_heads
    queries, keys, values = rotate(heads.queries, rotary)[0], rotate(heads.keys, rotary)[0], heads.values[0]
    hidden = torch.zeros(length, length, dtype=torch.bool)
    hidden[:prompt_rows, prompt_rows:] = True
    outputs, probabilities = [], []
    for head in range(block.n_heads):
        scores = queries[head] @ keys[head // shared].T / block.head_size**0.5
        probabilities.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1))
        outputs.append(probabilities[-1] @ values[head // shared])
    return block.attn_out(torch.cat(outputs, dim=-1)), torch.stack(probabilities)


@torch.no_grad()
def restated(
    model: Lavida, prompt: Tensor, ids: Sequence[int], merge: MergeConfig, keep: int, asked: int, kept: list[int] | None
) -> tuple[list[int], Tensor]:
    """One row's kept set and its logits (P' + G, rows) for the answer ``ids``, of which the first ``asked`` score.

    Nothing is cached and nothing of the merging's code is used. ``kept`` None: it is chosen.
    """
    transformer, rows = model.transformer, len(prompt)
    x = torch.cat([prompt, transformer.wte(torch.tensor(ids))])
    for block in transformer.blocks[: merge.layer]:
        x = x + _attention(block, x, rows, model)[0]
        x = block.feed_forward(x)
    block = transformer.blocks[merge.layer]
    attended, probabilities = _attention(block, x, rows, model)
    if kept is None and merge.select == "decider":
        importance = probabilities.mean(dim=0)[rows : rows + asked].sum(dim=0)[VISUAL].tolist()
        kept = sorted(sorted(range(len(VISUAL)), key=lambda token: -importance[token])[:keep])
    elif kept is None:
        kept = np.flatnonzero(uniform_selection_scores(len(VISUAL), keep)).tolist()
    normed = torch.nn.functional.normalize(block.attn_norm(x), dim=-1)
    joined: dict[int, list[int]] = {token: [token] for token in kept}
    for token in set(range(len(VISUAL))) - set(kept):
        nearest = max(kept, key=lambda other: float(normed[VISUAL[token]] @ normed[VISUAL[other]]))
        joined[nearest].append(token)
    residual = x.clone()
    for token, members in joined.items():
        total = torch.stack([x[VISUAL[member]] for member in members]).sum(dim=0)
        residual[VISUAL[token]] = total / len(members) if merge.aggregate == "mean" else total
    gone = {int(VISUAL[token]) for token in range(len(VISUAL)) if token not in joined}
    stays = [position for position in range(len(x)) if position not in gone]
    x = block.feed_forward((residual + attended)[stays])
    for block in transformer.blocks[merge.layer + 1 :]:
        x = x + _attention(block, x, rows - len(gone), model)[0]
        x = block.feed_forward(x)
    return kept, transformer.logits(x)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("select", "aggregate"), [("decider", "sum"), ("decider", "mean"), ("uniform", "sum")])
@pytest.mark.parametrize("shift", [False, True])
def test_it_is_an_uncached_merge_under_a_mask(
    eager_model: Lavida, layer: int, select: str, aggregate: str, shift: bool
) -> None:
    model = shifted(eager_model) if shift else eager_model
    merge = MergeConfig(layer, 0.7, select=select, aggregate=aggregate, merge_at="prefill")  # type: ignore[arg-type]
    generation = GenerationConfig(gen_length=6, block_length=3, step_ratio=0.7, suffix_ids=SUFFIX)
    prompts = prompts_of(3)
    records = answer(model, merge, generation, prompts)
    keep = 6  # int(20 * 0.3), truncated in double precision
    assert [record.keep for record in records] == [keep] * len(records)
    assert all(record.merged for record in records)
    for row in range(3):
        kept, before = None, [MASK] * 6
        for number, record in enumerate(records):
            # At the prefill every answer token is a mask, whatever the prompt's last row then predicts.
            chosen, _ = restated(model, torch.from_numpy(prompts[row]), [MASK] * 6 + list(SUFFIX), merge, keep, 6, kept)
            kept = chosen
            if shift and number == 0:
                _, logits = restated(model, torch.from_numpy(prompts[row]), [*before, *SUFFIX], merge, keep, 6, kept)
                first = model.config.language.choices
                before[0] = int(logits[30 - 20 + keep - 1, : first.rows].argmax())
                assert int(record.tokens[row, 0]) == before[0]
            _, logits = restated(model, torch.from_numpy(prompts[row]), [*before, *SUFFIX], merge, keep, 6, kept)
            assert record.result.kept is not None
            assert record.result.kept[row].tolist() == kept
            assert record.result.logits is not None
            own = slice(1, None) if shift else slice(None)
            wanted = logits[30 - 20 + keep - int(shift) :][:6].numpy()
            np.testing.assert_allclose(record.result.logits[row][own], wanted[own], atol=1e-4, rtol=0)
            before = record.tokens[row].tolist()


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("changes", [{"ratio": 0.0}, {"schedule": "none"}, {"keep_multiple": 32}])
def test_keeping_everything_is_the_plain_cached_loop(eager_model: Lavida, aggregate: str, changes: dict) -> None:
    merge = MergeConfig(1, **{"ratio": 0.7, "aggregate": aggregate, "merge_at": "prefill"} | changes)
    generation = GenerationConfig(gen_length=4)
    plain = answer(eager_model, MergeConfig(1, 0.7, "none"), generation, prompts_of(2))
    for one, other in zip(answer(eager_model, merge, generation, prompts_of(2)), plain, strict=True):
        assert one.keep == 20
        assert one.merged is (merge.schedule != "none")
        np.testing.assert_allclose(one.result.logits, other.result.logits, atol=1e-5, rtol=0)


def test_no_visual_token_merges_nothing(eager_model: Lavida) -> None:
    generation, none = GenerationConfig(gen_length=4), np.zeros(0, dtype=np.int64)
    runs = [
        answer(eager_model, merge, generation, prompts_of(2), none)
        for merge in (MergeConfig(1, 0.7, merge_at="prefill"), MergeConfig(1, 0.7))
    ]
    for one, other in zip(*runs, strict=True):
        assert (one.merged, one.result.kept) == (False, None)
        np.testing.assert_array_equal(one.result.logits, other.result.logits)


def test_a_near_tie_of_the_prefill_has_both_outcomes(eager_model: Lavida, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every call counts as close, steps have the outcomes of the four closest, alone and together."""
    merge, generation = MergeConfig(1, 0.7, merge_at="prefill"), GenerationConfig(gen_length=3)
    monkeypatch.setattr("d3tom_export.backends.pytorch.NEAR_TIE", 2.0)
    records = answer(eager_model, merge, generation, prompts_of(1))
    assert [len(record.result.alternative_logits) for record in records] == [15] * 3
    for other in records[0].result.alternative_logits:
        assert np.abs(other - records[0].result.logits).max() > 1e-4
    assert merge_module.NEAR_TIE < 1e-6
    backend = PyTorchBackend(eager_model, merge, kv_cache=True)
    unlogged = list(run_loop(backend, Prompt(prompts_of(1), VISUAL), MASK, generation, merge))
    assert all(record.result.alternative_logits == () for record in unlogged)


def test_scores_from_outside_choose_the_kept_set(eager_model: Lavida) -> None:
    merge, generation = MergeConfig(1, 0.7, merge_at="prefill"), GenerationConfig(gen_length=3)
    asked = prompt_merge(merge.in_loop(True), generation, MASK, batch=1, visual_tokens=20, logits=False)
    assert asked is not None
    chosen = np.zeros((1, 20), dtype=np.float32)
    chosen[0, [1, 4, 7, 8, 13, 19]] = 1.0
    backend = PyTorchBackend(eager_model, merge, kv_cache=True)
    session = backend.start(prompts_of(1), VISUAL, prompt_merge=replace(asked, selection_scores=chosen))
    assert session._held[0].kept.tolist() == [[1, 4, 7, 8, 13, 19]]


@pytest.mark.parametrize("options", [{"select": "fastv"}, {"select": "random"}, {"positions": "original"}])
def test_what_the_prefill_does_not_do_is_refused(eager_model: Lavida, options: dict) -> None:
    with pytest.raises(D3tomError, match="merged at its prefill with select decider or uniform"):
        PyTorchBackend(eager_model, MergeConfig(1, 0.5, merge_at="prefill", **options), kv_cache=True)
