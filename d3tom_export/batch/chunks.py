"""How many rows a process takes at once: what a kill costs, against what answering rows together gains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from d3tom_export.batch.rows import Row

_MOST = 4
"""Batches' worth of rows in a chunk, whose lines are written together: enough for rows of equal layout to meet."""

_MOMENT = 10.0
"""Seconds that a chunk's rows may take: what a kill takes along of each process."""


def useful_jobs(jobs: int, left: int, batch: int) -> int:
    """Of so many workers, how many get any of the rows that are left."""
    return -(-left // _least(left, jobs, batch)) if 0 < left < jobs * batch else min(jobs, left)


def _least(left: int, workers: int, batch: int) -> int:
    """Rows of the smallest chunk but the last: a batch's, or fewer where they would not go round."""
    return min(batch, -(-left // workers))


class Chunks:
    """The ``rows``, of which ``left`` are there, in chunks for so many workers; iterated once.

    The first ones are a batch each, so that lines come soon; later ones are what a worker answers in a moment, going by
    the rows that :meth:`answered` was told of, up to four batches. The fewer rows are left, the smaller.
    """

    def __init__(
        self, rows: Iterator[Row], left: int, workers: int, batch: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rows, self._left, self._workers, self._batch, self._clock = rows, left, workers, batch, clock
        self._least = max(1, _least(left, workers, batch))
        self._answered, self._started = 0, clock()

    def answered(self, rows: int) -> None:
        """Take note that so many rows more were answered."""
        self._answered += rows

    def __iter__(self) -> Iterator[list[Row]]:
        while chunk := list(islice(self._rows, self._size())):
            self._left -= len(chunk)
            yield chunk

    def _size(self) -> int:
        each = self._answered / self._workers  # of every worker's, since the start
        batches = int(each / max(self._clock() - self._started, 1e-9) * _MOMENT) // self._batch
        return max(self._least, min(max(1, min(batches, _MOST)) * self._batch, -(-self._left // self._workers)))
