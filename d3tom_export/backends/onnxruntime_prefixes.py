"""Prompts' prefixes that were prefilled before, so that a further question about a picture runs its own rows alone.

B batch, P rows of a prefix, C those of them that a merge at the prefill leaves, N key/value heads, d head size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.loop.denoise import Floats, Ints, PromptMerge

MOST_BYTES = 2 << 30
"""What is kept by default: one picture of LaViDa-8B's usual size in float32, some 680 of the bundled model's."""


@dataclass(frozen=True)
class Prefix:
    """What a prefix leaves behind."""

    tokens: Mapping[str, NDArray[Any]]
    """`keys_i` and `values_i` of every layer, token by token, keys before the rotary embedding: (B, P, N, d), or
    (B, C, N, d) behind l* where the prefix was merged. On the host, in the graphs' precision."""
    kept: Ints
    """(B, K) indices into the visual tokens, where it was merged; (B, 0) where not."""

    @property
    def nbytes(self) -> int:
        """Bytes of ``tokens``: 2*e*B*N*d for each row of each layer, at e bytes a number."""
        return sum(array.nbytes for array in self.tokens.values())


class PrefixStore:
    """Prefixes by what they follow from (:func:`prefix_key`), for one backend, whose weights and graphs they are of.

    Of more than ``most_bytes`` those go that nobody asked for the longest. One thread at a time.

    Args:
        most_bytes: Bytes of keys and values to keep; a prefix with more runs anew for every question.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self.nbytes = 0
        """Bytes of all that is kept."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Prefix | None:
        """The prefix of ``key``, which is then the last to go; None where it is not there."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: bytes, prefix: Prefix) -> None:
        """Keep a prefix whose ``key`` is not there, if it is not larger than all that may be kept."""
        if prefix.nbytes > self._most_bytes:
            return
        self._kept[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


def prefix_key(prefix_embeddings: Floats, visual_positions: Ints, merge: PromptMerge | None) -> bytes:
    """Sha256 of all that a prefix's keys and values follow from, shapes and dtypes included.

    Of a merge at the prefill that is how many tokens are kept, and what scores them: the answer's first rows, or scores
    from outside. Merges at the steps come later and change nothing here.
    """
    parts: list[NDArray[Any]] = [prefix_embeddings, visual_positions]
    if merge is not None:
        parts.append(np.array([merge.keep]))
        scores = merge.selection_scores
        parts += [merge.answer_ids, merge.deciders] if scores is None else [scores]
    digest = hashlib.sha256()
    for array in parts:
        digest.update(f"{array.dtype.str} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
