"""Where an answer ends: at stop texts, at end tokens, and what follows from an end for the rest of it.

B batch, G answer tokens. Imports no framework but NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def _first_place(tokens: Ints, sequence: tuple[int, ...], mask_token_id: int | None = None) -> int | None:
    """Where ``sequence`` first stands in ``tokens`` (G,), or may yet: with a ``mask_token_id`` masks may become any."""
    windows = len(tokens) - len(sequence) + 1
    if windows < 1:
        return None
    rows = (tokens[at : at + windows] for at in range(len(sequence)))
    alike = [
        (row == token) | (row == mask_token_id) if mask_token_id is not None else row == token
        for row, token in zip(rows, sequence, strict=True)
    ]
    matches = np.logical_and.reduce(alike)
    return int(matches.argmax()) if matches.any() else None


class Stops:
    """Where each row's answer ends, by the stop sequences that are found in it as it is made (spec-llada-v.md, 6)."""

    def __init__(self, sequences: tuple[tuple[int, ...], ...], batch: int, length: int) -> None:
        self._sequences, self._length = sequences, length
        self.end = np.full(batch, length, dtype=np.int64)
        """(B,) the place of its stop, or G."""

    def look(self, tokens: Ints) -> None:
        """Look into ``tokens`` (B, G), in which something was committed.

        Until a row has a stop, the first sequence of the list that occurs anywhere sets it; after that only the list's
        first one is looked for, and may move it to the left. As the original has it.
        """
        for row, end in enumerate(self.end.tolist()):
            for sequence in self._sequences if end == self._length else self._sequences[:1]:
                found = _first_place(tokens[row], sequence)
                if found is not None:
                    self.end[row] = min(end, found)
                    break

    @property
    def reached(self) -> Bools:
        """(B,) which rows have one."""
        return self.end < self._length

    def may_come_before(self, tokens: Ints, places: Ints, mask_token_id: int) -> Bools:
        """(B,) whether masks of ``tokens`` (B, G) may complete a stop that begins before ``places`` (B,)."""
        found = [
            [_first_place(row, sequence, mask_token_id) for sequence in self._sequences if len(sequence) > 1]
            for row in tokens
        ]
        return np.array(
            [
                any(at is not None and at < min(place, end) for at in starts)
                for starts, place, end in zip(found, places, self.end, strict=True)
            ],
            dtype=np.bool_,
        )


class EndTokens:
    """Tokens that end an answer's text: what stands behind the first of them is not read.

    Args:
        ids: The tokens.
        mask_token_id: What stands where nothing is committed yet.
    """

    def __init__(self, ids: tuple[int, ...], mask_token_id: int) -> None:
        self._ids, self._mask = np.array(ids, dtype=np.int64), mask_token_id

    def among(self, tokens: Ints) -> Bools:
        """(B, G) which of ``tokens`` are such."""
        return np.isin(tokens, self._ids)

    def first(self, tokens: Ints) -> Ints:
        """(B,) the place of the first in each row of ``tokens`` (B, G), or G."""
        ends = self.among(tokens)
        return np.where(ends.any(axis=1), ends.argmax(axis=1), tokens.shape[1])

    def _masks_before(self, tokens: Ints, places: Ints) -> Bools:
        return (tokens == self._mask) & (np.arange(tokens.shape[1]) < places[:, None])

    def settled(self, tokens: Ints, stops: Stops) -> Bools:
        """(B,) the rows of ``tokens`` (B, G) whose text no later step can change.

        There is an end token and no mask before it; nor can a stop sequence, completed behind it, begin before it.
        """
        places = self.first(tokens)
        filled = (places < tokens.shape[1]) & ~self._masks_before(tokens, places).any(axis=1)
        return filled & ~stops.may_come_before(tokens, places, self._mask) if filled.any() else filled

    def fill(self, tokens: Ints, stops: Stops) -> tuple[Ints, Bools]:
        """``tokens`` (B, G) with each row's first end token in all masks behind it, up to a stop; and which those were.

        A guess, and a good one where models pad answers with end tokens: those masks would see their own context yet.
        """
        places = self.first(tokens)
        positions = np.arange(tokens.shape[1])
        behind = (positions > places[:, None]) & (positions < stops.end[:, None]) & (tokens == self._mask)
        last = tokens[np.arange(len(tokens)), np.minimum(places, tokens.shape[1] - 1)]
        return np.where(behind, last[:, None], tokens), behind

    def looking(self, tokens: Ints, committed: Bools) -> Bools:
        """Which positions (B, G) decide after a step that ``committed`` (B, G): those that look at the picture.

        Committed end tokens do not, where others were committed too; where none was, the masks before the first end
        token decide in their place, and where there are no such masks either, what was committed does after all.
        """
        speaking = committed & ~self.among(tokens)
        masks = self._masks_before(tokens, self.first(tokens))
        instead = np.where(masks.any(axis=1, keepdims=True), masks, committed)
        instead &= committed.any(axis=1, keepdims=True)
        return np.where(speaking.any(axis=1, keepdims=True), speaking, instead)
