"""Rows on their way to whoever answers them: handed out as workers ask, asked again after a death, back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from d3tom_export.batch.faults import UNEXPECTED
from d3tom_export.batch.rows import Row, id_of

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
    again: bool = False
    """Whether it is a row that failed unexpectedly before."""
    by: object = field(default=None, compare=False, repr=False)
    """The worker that it failed with: another one is asked now, if there is one."""


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

    Rows that a dead worker had are asked again, each by itself; one that two workers died of is passed over. A row that
    fails unexpectedly is asked once more, by another worker where one is there.
    """

    def __init__(self, chunks: Iterable[Sequence[Row]], workers: int) -> None:
        self._coming, self._most = iter(chunks), _AHEAD * workers
        self._upcoming = next(self._coming, None)
        self._started = self._given = self._asked = 0
        self._out: dict[int, _Chunk] = {}
        self._again: deque[Parcel] = deque()

    @property
    def done(self) -> bool:
        """Whether all chunks were given out by :meth:`whole`."""
        return self._upcoming is None and not self._out

    def next(self, worker: object = None) -> Parcel | None:
        """What to ask ``worker`` next; None while the next chunk in order is waited for, and at the end.

        None for the worker: whoever is there is asked, also again.
        """
        for at, parcel in enumerate(self._again):
            if worker is None or parcel.by is not worker:
                del self._again[at]
                self._asked += 1
                return parcel
        rows = self._upcoming
        if rows is None or self._started - self._given >= self._most:
            return None
        self._upcoming = next(self._coming, None)
        self._out[self._started] = _Chunk(rows)
        self._started += 1
        self._asked += 1
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
            free = [worker for worker in workers if is_free(worker)]
            for worker in free:
                if (parcel := self.next(worker)) is not None:
                    send(worker, parcel)
            if free and not self._asked and (parcel := self.next()) is not None:
                send(free[0], parcel)  # nobody else is there to ask
            yield from whole  # while the others work
            if not self.done:
                hear()

    def answered(self, parcel: Parcel, found: Found, by: object = None) -> None:
        """Take what became of the rows of ``parcel``, which the worker ``by`` was asked."""
        self._asked -= 1
        for row, body in zip(parcel.rows, found, strict=True):
            if UNEXPECTED in body and not parcel.again:
                self._again.append(Parcel(parcel.chunk, [row], parcel.deaths, again=True, by=by))
            else:
                self._out[parcel.chunk].found[row.index] = body

    def died(self, parcel: Parcel, death: str, *, of_it: bool = True) -> None:
        """Take back the rows of a worker that died; ``death`` says how, ``of_it`` whether they may be why."""
        self._asked -= 1
        if not of_it:
            self._again.append(parcel)
            return
        for row in parcel.rows:
            if len(parcel.rows) == 1 and parcel.deaths:
                self._out[parcel.chunk].found[row.index] = {
                    "id": id_of(row),
                    UNEXPECTED: True,
                    "error": f"The process that answered this row died ({death}), and so did another one before.",
                }
            else:
                self._again.append(Parcel(parcel.chunk, [row], parcel.deaths + 1, parcel.again))

    def whole(self) -> list[tuple[Sequence[Row], Found]]:
        """The chunks that are next in order and done, each with what was found of its rows; makes room for others."""
        found = []
        while self._given in self._out and self._out[self._given].whole:
            chunk = self._out.pop(self._given)
            self._given += 1
            found.append((chunk.rows, [chunk.found[row.index] for row in chunk.rows]))
        return found
