"""The merge as three Triton kernels: nearest kept token, stable order, segmented sum.

Importing this module needs Triton. It is the one source of every compiled form: the just-in-time kernels, the cubins
and PTX of :mod:`d3tom_export.plugins.compiled`, and, under ``TRITON_INTERPRET=1``, the same code run on the CPU.

    nearest_kept_kernel  normed (B, V, D) T, kept (B, K) int64 ascending
                         -> scores (B, N, V) float32, slots (B, N, V) int32: the best kept token of each of N blocks
    token_order_kernel   scores, slots, kept
                         -> order (B, V) int32, starts (B, K) int32: tokens sorted by target, each slot's first place
    segment_sum_kernel   hidden (B, V, W) T, order, starts
                         -> merged (B, K, W) T

Parameters stand in the order inputs, sizes, outputs, which TensorRT's ahead-of-time plugins launch with. All tensors
are dense and row-major. Nothing is added atomically and no reduction depends on the order in which programs run, so
equal inputs give equal bits. Source of the algorithm: algorithm.md, "Merging at layer l*", steps 4 and 5.
"""

# Triton kernels are typed by their launches, and the sizes keep the house's capital names.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads globals only as constexpr.
NO_SLOT = tl.constexpr(2**31 - 1)
LARGEST = tl.constexpr(3.4028234663852886e38)
SMALLEST_NORM = tl.constexpr(1e-12)  # the operator body's clamp


@triton.jit
def nearest_kept_kernel(
    normed,
    kept,
    V,
    K,
    D,
    scores,
    slots,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Tile (token block, kept block, batch): each token's most similar kept token within the kept block.

    A token's own norm scales all its similarities alike, so only the kept rows' norms are divided out. A kept token
    scores infinity against itself, which no similarity reaches: those are held to the largest float32, and NaN to
    minus infinity. ``WIDEN`` multiplies in float32 what came narrower: the same products, for Triton's interpreter,
    whose dot takes bfloat16 for the integers of its bits.
    """
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    token_in = tokens < V
    kept_rows = tl.load(kept + batch * K + columns, mask=columns < K, other=-1)
    # An index outside the tokens must not become an address.
    kept_in = (kept_rows >= 0) & (kept_rows < V)

    rows = normed + batch * V * D
    token_row = tokens[:, None] * D
    kept_row = tl.where(kept_in, kept_rows, 0).to(tl.int32)[None, :] * D
    depth = tl.arange(0, BLOCK_D)
    products = tl.zeros((BLOCK_V, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + depth < D
        x = tl.load(rows + token_row + (start + depth)[None, :], mask=token_in[:, None] & inside[None, :], other=0.0)
        y = tl.load(rows + kept_row + (start + depth)[:, None], mask=kept_in[None, :] & inside[:, None], other=0.0)
        wide = y.to(tl.float32)
        if WIDEN:
            products = tl.dot(x.to(tl.float32), wide, products, input_precision="ieee")
        else:
            products = tl.dot(x, y, products, input_precision="ieee")
        squares += tl.sum(wide * wide, axis=0)

    norms = tl.maximum(tl.math.sqrt_rn(squares), SMALLEST_NORM)
    similarity = tl.math.div_rn(products, tl.broadcast_to(norms[None, :], (BLOCK_V, BLOCK_K)))
    similarity = tl.where(similarity == similarity, tl.minimum(similarity, LARGEST), float("-inf"))
    similarity = tl.where(kept_in[None, :], similarity, float("-inf"))
    similarity = tl.where(kept_rows[None, :] == tokens[:, None], float("inf"), similarity)
    best = tl.max(similarity, axis=1)
    # Among equals the lowest slot.
    slot = tl.min(tl.where(similarity == best[:, None], columns[None, :], NO_SLOT), axis=1)
    place = (batch * tl.num_programs(1) + tl.program_id(1)) * V + tokens
    tl.store(scores + place, best, mask=token_in)
    tl.store(slots + place, slot, mask=token_in)


@triton.jit
def _targets(scores, slots, tokens, V, K, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The best slot over all N kept blocks of ``tokens`` (BLOCK,), K where a token is none."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    target = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, N, BLOCK_N):
        blocks = first + tl.arange(0, BLOCK_N)
        inside = (blocks < N)[:, None] & (tokens < V)[None, :]
        place = blocks[:, None] * V + tokens[None, :]
        score = tl.load(scores + place, mask=inside, other=float("-inf"))
        slot = tl.load(slots + place, mask=inside, other=NO_SLOT)
        top = tl.max(score, axis=0)
        # Among equals the lowest slot again; earlier blocks hold the lower slots.
        lowest = tl.min(tl.where(score == top[None, :], slot, NO_SLOT), axis=0)
        target = tl.where(top > best, lowest, target)
        best = tl.maximum(best, top)
    return tl.where(tokens < V, tl.minimum(target, K - 1), K)


@triton.jit
def token_order_kernel(
    scores,
    slots,
    kept,
    V,
    K,
    N,
    order,
    starts,
    BLOCK_V: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tile (token block, batch): where each token stands when all are sorted by target, then by position.

    A token's place is the number of tokens before it, counted against every other: V*V comparisons, which take the
    place of a sort that would need the whole device to wait for itself. ``kept`` is not read: it is there for plugins
    whose sizes come from their inputs' shapes alone, to which it tells K.
    """
    batch = tl.program_id(1).to(tl.int64)
    scores += batch * N * V
    slots += batch * N * V
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    target = _targets(scores, slots, tokens, V, K, N, BLOCK_V, BLOCK_N)
    first_key = target * V
    key = first_key + tokens
    place = tl.zeros((BLOCK_V,), tl.int32)
    start = tl.zeros((BLOCK_V,), tl.int32)
    for first in range(0, V, BLOCK_U):
        others = first + tl.arange(0, BLOCK_U)
        other_key = _targets(scores, slots, others, V, K, N, BLOCK_U, BLOCK_N) * V + others
        place += tl.sum((other_key[None, :] < key[:, None]).to(tl.int32), axis=1)
        start += tl.sum((other_key[None, :] < first_key[:, None]).to(tl.int32), axis=1)
    token_in = tokens < V
    tl.store(order + batch * V + place, tokens, mask=token_in)
    # The first token of a slot writes where it starts: one writer each. Every slot has at least its own token.
    tl.store(starts + batch * K + target, start, mask=token_in & (place == start))


@triton.jit
def segment_sum_kernel(
    hidden,
    order,
    starts,
    V,
    K,
    W,
    merged,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Tile (column block, slot, batch): the sum of the slot's rows, in float32, BLOCK_R rows in flight at a time.

    Every row of ``hidden`` is read exactly once by the whole grid.
    """
    batch = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    column_in = columns < W
    # Clamped: a slot that no token claimed (kept was not what it must be) holds whatever the memory held.
    start = tl.maximum(tl.load(starts + batch * K + slot), 0)
    end = tl.minimum(tl.load(starts + batch * K + slot + 1, mask=slot + 1 < K, other=V), V)
    rows = hidden + batch * V * W
    sums = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        entries = first + tl.arange(0, BLOCK_R)
        token = tl.load(order + batch * V + entries, mask=entries < end, other=0)
        inside = (entries < end)[:, None] & column_in[None, :]
        sums += tl.load(rows + token[:, None] * W + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0)
    tl.store(merged + (batch * K + slot) * W + columns, total.to(merged.dtype.element_ty), mask=column_in)
