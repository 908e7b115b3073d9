"""The merge: every visual token that is not kept goes to its most similar kept token.

Plain and deterministic: the reference for the ``D3ToMMerge`` node and for every kernel that replaces it.
B batch, V visual tokens, K kept, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d3tom_export.config import Aggregation

NEAR_TIE = 5e-7
"""A difference of cosine similarity, eight units in the last place of a float32 just below 1, that another runtime's
rounding may turn."""


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, V, D): (B, K, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _similarity(normed: Tensor, kept: Tensor, targets: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosine similarity in ``dtype`` of every token to every kept one, -inf where it may not go: (B, V, K)."""
    unit = F.normalize(normed.to(dtype), dim=-1)
    similarity = unit @ gather_rows(unit, kept).transpose(1, 2)
    return similarity if targets is None else similarity.masked_fill(~targets.unsqueeze(1), -torch.inf)


def _first_of_its_kind(rows: Tensor, targets: Tensor | None) -> Tensor:
    """For each of ``rows`` (B, K, D) the first that is the same vector and, like it, one of ``targets``: (B, K) int64.

    A product of matrices need not give identical columns identical results; so that ties between them go to the lower
    index, they are told by their numbers.
    """
    weights = torch.sin(torch.arange(1.0, rows.shape[-1] + 1, dtype=torch.float64, device=rows.device))
    code = (rows.double() * weights).sum(-1)
    same = code.unsqueeze(2) == code.unsqueeze(1)
    if targets is not None:
        same &= targets.unsqueeze(1)
    index = torch.arange(rows.shape[1], device=rows.device)
    first = torch.where(same, index, rows.shape[1]).amin(-1).minimum(index)
    return first.where((gather_rows(rows, first) == rows).all(-1), index)


def _most_similar(similarity: Tensor, normed: Tensor, kept: Tensor, targets: Tensor | None) -> Tensor:
    """The kept token of the largest ``similarity`` (B, V, K), the lowest of identical ones: (B, V) int64."""
    first = _first_of_its_kind(gather_rows(normed, kept), targets)
    return first.gather(1, similarity.argmax(dim=-1))


class NearTie(NamedTuple):
    """A token whose two most similar kept tokens differ by no more than rounding may turn: it may join either."""

    layer: int
    """The layer whose merge it is."""
    row: int
    """Of the batch."""
    token: int
    other: int
    """The kept token, an index into the K, that it may join instead."""
    gap: float
    """Difference of the two similarities."""


def near_ties(
    normed: Tensor, kept: Tensor, layer: int, targets: Tensor | None = None, within: float = NEAR_TIE
) -> list[NearTie]:
    """The near-ties of a merge at ``layer``, closest first; arguments as for :func:`nearest_kept`.

    ``within`` is the difference of cosine similarity that counts as one. It is taken in float64: in float32 the
    difference itself is off by 5e-7 at 256 numbers, by how the processor adds up.
    """
    if kept.shape[1] == 1:
        return []
    similarity = _similarity(normed, kept, targets)
    nearest = _most_similar(similarity, normed, kept, targets)
    first, second = similarity.topk(2, dim=-1).indices.unbind(-1)
    other = first.where(first != nearest, second)  # of three that tie, topk may list the two others
    exact = _similarity(normed, kept, targets, torch.float64)
    gap = (exact.gather(-1, nearest[..., None]) - exact.gather(-1, other[..., None])).abs().squeeze(-1)
    gap = gap.scatter(1, kept, torch.inf)
    calls = (gap <= within).nonzero().tolist()
    ties = [NearTie(layer, row, token, int(other[row, token]), float(gap[row, token])) for row, token in calls]
    return sorted(ties, key=lambda tie: tie.gap)


def nearest_kept(normed: Tensor, kept: Tensor, targets: Tensor | None = None, turned: Sequence[NearTie] = ()) -> Tensor:
    """For each token the index (0..K-1) of its most similar kept token: (B, V) int64.

    Cosine similarity of ``normed`` (B, V, D) in float32; ties go to the lower index. A kept token, ``kept`` (B, K)
    ascending, always stays with itself, even beside an identical twin. ``targets`` (B, K) bool says which kept tokens
    take others in; None: all. The ``turned`` near-ties join their other choice instead.
    """
    nearest = _most_similar(_similarity(normed, kept, targets), normed, kept, targets)
    for tie in turned:
        nearest[tie.row, tie.token] = tie.other
    return nearest.scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))


def merge_tokens(
    hidden: Tensor, normed: Tensor, kept: Tensor, aggregate: Aggregation = "sum", nearest: Tensor | None = None
) -> Tensor:
    """Kept tokens with the others summed (or averaged) into them: (B, K, D) in the dtype of ``hidden``.

    ``hidden`` (B, V, D) is the residual stream of the visual tokens, ``normed`` (B, V, D) decides who goes where
    unless ``nearest`` (B, V) says so. Sums run in float32 in ascending order of position.
    """
    nearest = nearest_kept(normed, kept) if nearest is None else nearest
    rows = hidden.float()
    sums = rows.new_zeros(kept.shape[0], kept.shape[1], hidden.shape[-1])
    sums = sums.scatter_add(1, nearest.unsqueeze(-1).expand_as(rows), rows)
    if aggregate == "mean":
        ones = torch.ones_like(nearest, dtype=sums.dtype)
        counts = sums.new_zeros(kept.shape).scatter_add(1, nearest, ones)
        sums = sums / counts.unsqueeze(-1)
    return sums.to(hidden.dtype)
