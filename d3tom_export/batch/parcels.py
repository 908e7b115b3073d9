"""Rows on their way to whoever answers them: handed out as workers ask, asked again after a death, back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from d3tom_export.batch.rows import Row

_AHEAD = 4
"""Chunks for each worker that may be out or done before the next one in order is: what is held in memory."""

W = TypeVar("W")

Found = list[dict[str, Any]]
"""What became of rows, in their order."""


@dataclass(frozen=True)
class Parcel:
    """Rows of a chunk that are asked together."""

    chunk: int
    rows: Sequence[Row]
    deaths: int = 0
    """Of workers that had them."""


@dataclass
class _Chunk:
    """What is known of a chunk's rows so far, by index."""

    rows: Sequence[Row]
    found: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.found) == len(self.rows)


class Parcels:
    """The parcels of ``chunks`` for so many ``workers``, which may die of them.

    Rows that a dead worker had are asked again, each by itself; one that two workers died of is passed over.
    """

    def __init__(self, chunks: Iterable[Sequence[Row]], workers: int) -> None:
        self._coming, self._most = iter(chunks), _AHEAD * workers
        self._upcoming = next(self._coming, None)
        self._started = self._given = 0
        self._out: dict[int, _Chunk] = {}
        self._again: deque[Parcel] = deque()

    @property
    def done(self) -> bool:
        """Whether all chunks were given out by :meth:`whole`."""
        return self._upcoming is None and not self._out

    def next(self) -> Parcel | None:
        """What to ask next; None while the next chunk in order is waited for, and at the end."""
        if self._again:
            return self._again.popleft()
        rows = self._upcoming
        if rows is None or self._started - self._given >= self._most:
            return None
        self._upcoming = next(self._coming, None)
        self._out[self._started] = _Chunk(rows)
        self._started += 1
        return Parcel(self._started - 1, rows)

    def handed_out(
        self,
        workers: Sequence[W],
        is_free: Callable[[W], bool],
        send: Callable[[W, Parcel], None],
        hear: Callable[[], None],
    ) -> Iterator[tuple[Sequence[Row], Found]]:
        """Each of the chunks with what was found of its rows, in order.

        ``send`` gives a parcel to one of the ``workers`` that ``is_free``, and ``hear`` waits until one of them has
        answered (:meth:`answered`) or died (:meth:`died`); others may stand in ``workers`` then.
        """
        while not self.done:
            whole = self.whole()
            for worker in workers:
                if is_free(worker):
                    parcel = self.next()
                    if parcel is None:
                        break
                    send(worker, parcel)
            yield from whole  # while the others work
            if not self.done:
                hear()

    def answered(self, parcel: Parcel, found: Found) -> None:
        """Take what became of the rows of ``parcel``."""
        for row, body in zip(parcel.rows, found, strict=True):
            self._out[parcel.chunk].found[row.index] = body

    def died(self, parcel: Parcel, death: str) -> None:
        """Take back the rows of a worker that died; ``death`` says how."""
        for row in parcel.rows:
            if len(parcel.rows) == 1 and parcel.deaths:
                self._out[parcel.chunk].found[row.index] = {
                    "id": str(row.number),
                    "error": f"The process that answered this row died ({death}), and so did another one before.",
                }
            else:
                self._again.append(Parcel(parcel.chunk, [row], parcel.deaths + 1))

    def whole(self) -> list[tuple[Sequence[Row], Found]]:
        """The chunks that are next in order and done, each with what was found of its rows; makes room for others."""
        found = []
        while self._given in self._out and self._out[self._given].whole:
            chunk = self._out.pop(self._given)
            self._given += 1
            found.append((chunk.rows, [chunk.found[row.index] for row in chunk.rows]))
        return found
