"""The very kernels, in Triton's interpreter on the CPU, against the eager merge."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d3tom_export.merging.merge import merge_tokens, nearest_kept
from d3tom_export.plugins.launch import DTYPES
from tests.plugins import interpreter
from tests.plugins.interpreter import Interpret, Interpreted

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-7}
"""Of the result, relative: sums are float32, so only the last rounding counts. Half a unit in the last place; a whole
one for bfloat16, to which the interpreter cuts where a GPU rounds."""
SUM_ERROR = 2e-6
"""Of a float32 sum in another order, relative to the sum of magnitudes, for up to a few hundred rows."""
NEAR = 4e-6
"""Of a float32 cosine similarity, some tens of units in the last place: the worse of two near-ties may win."""


def as_dtype(array: np.ndarray, dtype: str) -> torch.Tensor:
    """``array`` rounded to ``dtype``, as the kernels see it."""
    return torch.from_numpy(array).to(getattr(torch, dtype))


def targets_of(order: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    """The target (B, V) of each token, from the sorted order (B, V) and each slot's start (B, K)."""
    batch, visual = order.shape
    targets = torch.full((batch, visual), -1)
    for b in range(batch):
        assert sorted(order[b]) == list(range(visual))
        assert starts[b, 0] == 0
        sizes = np.diff([*starts[b], visual])
        assert (sizes > 0).all()
        targets[b, torch.from_numpy(order[b]).long()] = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    return targets


def check(result: Interpreted, hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray, dtype: str) -> torch.Tensor:
    """Holds a result to the oracle, near-ties allowed for; returns the targets."""
    targets = targets_of(result.order, result.starts)
    for b, row in enumerate(result.order):  # stable: ascending within each slot
        assert all(row[i] < row[i + 1] for i in range(len(row) - 1) if targets[b, row[i]] == targets[b, row[i + 1]])
    index = torch.from_numpy(kept)
    assert torch.equal(targets.gather(1, index), torch.arange(kept.shape[1]).expand_as(index))
    rows = as_dtype(normed, dtype).double()
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    similarity = unit @ unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1])).transpose(1, 2)
    chosen = similarity.gather(2, targets[..., None])[..., 0].scatter(1, index, torch.inf)
    assert (chosen >= similarity.amax(-1) - NEAR).all()

    values = as_dtype(hidden, dtype)
    expected = merge_tokens(values.double().float(), rows.float(), index, nearest=targets).double()
    magnitude = merge_tokens(values.float().abs(), rows.float(), index, nearest=targets).double()
    error = (torch.from_numpy(result.merged).double() - expected).abs()
    assert (error <= SUM_ERROR * magnitude + ROUNDING[dtype] * expected.abs() * 1.01).all()
    return targets


@st.composite
def merges(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """hidden (B, V, W), normed (B, V, D), kept (B, K); whether similarities are exact, with many ties."""
    batch, visual = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    keep = draw(st.one_of(st.just(1), st.just(visual), st.integers(1, visual)))
    depth, width = draw(st.sampled_from([1, 16, 33, 64, 144, 160])), draw(st.sampled_from([1, 16, 33, 130, 272]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    hidden = rng.normal(size=(batch, visual, width)).astype(np.float32)
    normed = rng.normal(size=(batch, visual, depth)).astype(np.float32)
    exact = draw(st.booleans())
    if exact:  # rows along the axes, some of them zero: similarities are exactly 0 or 1
        scale = 2.0 ** rng.integers(-3, 4, (batch, visual, 1)) * rng.integers(0, 4, (batch, visual, 1)).clip(max=1)
        normed = (np.eye(depth)[rng.integers(0, min(depth, 9), (batch, visual))] * scale).astype(np.float32)
    kept = np.stack([np.sort(rng.permutation(visual)[:keep]) for _ in range(batch)])
    return hidden, normed, kept, exact


@given(merges(), st.sampled_from(DTYPES), st.booleans())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_are_the_eager_merge(
    interpret: Interpret, case: tuple[np.ndarray, np.ndarray, np.ndarray, bool], dtype: str, wide: bool
) -> None:
    hidden, normed, kept, exact = case
    targets = check(interpret(interpreter.merge, hidden, normed, kept, dtype, wide), hidden, normed, kept, dtype)
    if exact:
        oracle = nearest_kept(as_dtype(normed, dtype), torch.from_numpy(kept))
        assert torch.equal(targets, oracle)


def test_more_kept_blocks_than_one_load_takes(interpret: Interpret) -> None:
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(1, 300, 5)).astype(np.float32)
    normed = rng.normal(size=(1, 300, 16)).astype(np.float32)
    kept = np.sort(rng.permutation(300)[:290])[None]  # ten narrow blocks of 32, loaded eight at a time
    result = interpret(interpreter.merge, hidden, normed, kept, "float16")
    check(result, hidden, normed, kept, "float16")


def test_ties_across_blocks_go_to_the_lower_slot(interpret: Interpret) -> None:
    normed = np.ones((1, 300, 16), np.float32)
    hidden = np.arange(300, dtype=np.float32).reshape(1, 300, 1)
    kept = np.arange(10, 300)[None]
    result = interpret(interpreter.merge, hidden, normed, kept, "float32")
    assert result.merged[0, 0, 0] == sum(range(11))  # tokens 0 to 9 join slot 0, which is token 10
    np.testing.assert_array_equal(result.merged[0, 1:, 0], np.arange(11, 300))


def test_half_precision_sums_in_float32(interpret: Interpret) -> None:
    hidden = np.ones((1, 2100, 1), np.float32)
    normed = np.ones((1, 2100, 16), np.float32)
    result = interpret(interpreter.merge, hidden, normed, np.zeros((1, 1), np.int64), "float16")
    # A float16 running sum of ones would stick at 2048.
    assert result.merged.item() == 2100


def test_nan_and_infinity_stay_in_their_slot(interpret: Interpret) -> None:
    rng = np.random.default_rng(5)
    hidden, normed = rng.normal(size=(2, 1, 40, 16)).astype(np.float32)
    kept = np.arange(0, 40, 4)[None]
    hidden[0, 4], hidden[0, 8] = np.nan, np.inf  # kept tokens 1 and 2
    normed[0, 13], normed[0, 17] = np.nan, np.inf  # these may go anywhere, but somewhere
    result = interpret(interpreter.merge, hidden, normed, kept, "float32")
    targets_of(result.order, result.starts)
    assert np.isnan(result.merged[0, 1]).all()
    assert np.isposinf(result.merged[0, 2]).all()
    assert np.isfinite(result.merged[0, [0, *range(3, 10)]]).all()


def test_equal_inputs_give_equal_bits(interpret: Interpret) -> None:
    rng = np.random.default_rng(9)
    hidden, normed = rng.normal(size=(2, 2, 65, 48)).astype(np.float32)
    kept = np.stack([np.sort(rng.permutation(65)[:7]) for _ in range(2)])
    first, second = (interpret(interpreter.merge, hidden, normed, kept, "bfloat16") for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first[:3], second[:3], strict=True))
    # Nor do the others in its batch matter, where the same tiles are taken.
    alone = interpret(interpreter.merge, hidden[1:], normed[1:], kept[1:], "bfloat16")
    assert alone.merged.tobytes() == first.merged[1:].tobytes()


def test_an_index_outside_the_tokens_is_never_an_address(interpret: Interpret) -> None:
    rng = np.random.default_rng(11)
    hidden, normed = rng.normal(size=(2, 1, 20, 16)).astype(np.float32)
    kept = np.array([[2, 7, 10**12]])
    merged = interpret(interpreter.merge, hidden, normed, kept, "float32").merged
    assert merged.shape == (1, 3, 16)
    assert np.isfinite(merged[0, :2]).all()
