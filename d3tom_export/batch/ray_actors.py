"""A batch's rows answered by actors on the machines of a Ray cluster, in order, whatever becomes of those machines.

The actors are Ray's own, not those of Ray Data's pool: docs/batch.md says what that loses. Ray is the optional extra
``ray``, imported only here and only when a cluster is asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from d3tom_export.batch.answering import Answering, Job, open_answering
from d3tom_export.batch.output import Run
from d3tom_export.batch.parcels import Found, Parcel, Parcels
from d3tom_export.batch.rows import Row
from d3tom_export.errors import D3tomError, listing, printable
from d3tom_export.progress import Note

_PATIENCE = 30.0
"""Seconds after which the user is told that actors are not there yet, and a cluster that does not answer is none."""
_MOST_DEATHS = 3
"""Of actors that open the bundle, one after the other: by then it is the bundle's or the machines' fault."""
_PLACES = "The bundle and --input must be at the same path on every machine of the cluster, and on this one."


def need_ray() -> None:
    """Raise :class:`D3tomError` where Ray cannot be imported."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise D3tomError(
            f"--ray answers through Ray, which is not installed here ({error}). Install it with "
            '`pip install "d3tom-export[ray]"`, here and on every machine of the cluster.'
        ) from None


def actors_for(machines: Iterable[tuple[float, float]], jobs: int | None, gpu: bool) -> tuple[int, int]:
    """How many actors there are, and how many cores each takes.

    Args:
        machines: Cores and GPUs of each.
        jobs: How many were asked for. None: one for each GPU with ``gpu``, else one for each core.
        gpu: Whether each takes a GPU.

    The cores are as many as let all actors run at once; where the machines are too few for that, one.
    """
    machines = list(machines)

    def room(cores: int) -> int:
        return sum(int(min(cpus // cores, gpus) if gpu else cpus // cores) for cpus, gpus in machines)

    jobs = jobs or max(1, room(1))
    most = int(max((cpus for cpus, _ in machines), default=1))
    return jobs, max((cores for cores in range(1, most + 1) if room(cores) >= jobs), default=1)


@dataclass(frozen=True)
class _Opened:
    """What an actor says of itself once it has tried to open the bundle."""

    node: str
    error: str = ""
    """Why it could not; "" where it could."""
    run: Run | None = None
    notes: Sequence[str] = ()


class BatchActor:
    """What runs on the cluster: one open model that answers the rows it is sent."""

    def open(self, job: Job, threads: int, folder: str) -> _Opened:
        """Open the job's bundle, once; relative paths are taken from ``folder``, the user's."""
        import ray

        node = f"{ray.util.get_node_ip_address()} ({socket.gethostname()})"
        with suppress(OSError):
            os.chdir(folder)
        self._notes: list[str] = []
        try:
            self._answering: Answering = open_answering(job, threads, self._notes.append)
        except D3tomError as error:
            return _Opened(node, str(error))
        backend, precision = self._answering.runtime
        return _Opened(node, "", replace(self._answering.run, backend=backend, precision=precision), self._told())

    def answer(self, rows: Sequence[Row]) -> tuple[Found, Sequence[str]]:
        """What became of ``rows``, and what the user should know of them."""
        return self._answering.answer(rows), self._told()

    def _told(self) -> list[str]:
        told = list(self._notes)
        self._notes.clear()
        return told


class _Actor:
    """One actor as this process knows it: what it was asked last."""

    def __init__(self, handle: Any, opening: Any) -> None:
        self.handle, self.asked = handle, opening
        """The actor, and the reference of what it does now; None while it is idle."""
        self.node = ""
        """Where it is; "" until it has opened the bundle."""
        self.parcel: Parcel | None = None


class RayActors:
    """Actors on the cluster at ``address`` for one job; a context, which ends them.

    Args:
        job: The job.
        run: What its answers follow from on this machine: actors whose answers would follow from else are refused.
        address: As ``ray.init`` takes it: ``HOST:PORT``, "auto", or "local" for a cluster of this machine.
        jobs: How many actors; None: :func:`actors_for`.
        note: Called with sentences for the user.
        most: More are not of use: the rows that are left.

    Raises :class:`D3tomError`, at any time, where there is no cluster, or where one of its machines cannot open the
    bundle, dies of it or would answer otherwise.
    """

    def __init__(self, job: Job, run: Run, address: str, jobs: int | None, note: Note, most: int | None = None) -> None:
        self._most = most
        self._job, self._run, self._address, self._jobs, self._note = job, run, address, jobs, note
        self._actors: list[_Actor] = []
        self._parcels: Parcels | None = None
        self._deaths = 0
        self._noted: set[str] = set()
        self._connected = False
        self._made: Any = None
        """What makes an actor: Ray's class with its options."""
        self._cores, self._takes = 1, ""
        self._started = 0.0
        """When an actor was asked for last."""
        self.runtime: tuple[str, str] = ("", "")
        """Name and precision of the backend; known after :meth:`__enter__`."""

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._actors)

    def __enter__(self) -> RayActors:
        need_ray()
        import ray

        try:
            if not ray.is_initialized():
                _connect(self._address)
                self._connected = True
            gpus = sum(gpus for _, gpus in _machines())
            opening = self._job.opening
            gpu = gpus > 0 and opening.get("device") != "cpu" and opening.get("backend") != "pytorch"
            jobs, cores = actors_for(_machines(), self._jobs, gpu)
            if self._most is not None and self._most < jobs:
                jobs, cores = actors_for(_machines(), self._most, gpu)
            self._takes = f"{cores} core{'s' * (cores > 1)}{' and a GPU' if gpu else ''}"
            self._cores = cores
            self._made = ray.remote(BatchActor).options(
                num_cpus=cores, num_gpus=int(gpu), max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
            )
            self._started = time.monotonic()
            self._actors = [self._start() for _ in range(jobs)]
            while not any(actor.node for actor in self._actors):
                self._hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            with suppress(Exception):  # the cluster may be gone
                ray.kill(actor.handle)
        if self._connected:
            with suppress(Exception):
                ray.shutdown()

    def answers(self, chunks: Iterable[Sequence[Row]]) -> Iterator[tuple[Sequence[Row], Found]]:
        """Each of ``chunks`` with what was found of its rows, in order."""
        self._parcels = Parcels(chunks, len(self._actors))
        return self._parcels.handed_out(self._actors, lambda actor: actor.asked is None, self._send, self._hear)

    def _start(self) -> _Actor:
        handle = self._made.remote()
        return _Actor(handle, handle.open.remote(self._job, self._cores, os.getcwd()))

    def _send(self, actor: _Actor, parcel: Parcel) -> None:
        actor.parcel = parcel
        actor.asked = actor.handle.answer.remote(list(parcel.rows))

    def _hear(self) -> None:
        """Wait for actors to end what they were asked, or to die; and tell whom the others wait for."""
        import ray
        from ray.exceptions import RayError

        by_reference = {actor.asked: actor for actor in self._actors if actor.asked is not None}
        heard, _ = ray.wait(list(by_reference), num_returns=1, timeout=1.0)
        for reference in heard:
            actor = by_reference[reference]
            try:
                value = ray.get(reference)
            except RayError as error:
                self._bury(actor, error)
                continue
            actor.asked = None
            if isinstance(value, _Opened):
                self._opened(actor, value)
                continue
            found, notes = value
            for sentence in notes:
                self._note(sentence)
            assert self._parcels is not None
            assert actor.parcel is not None
            self._parcels.answered(actor.parcel, found, actor)
            actor.parcel = None
        waiting = sum(not actor.node for actor in self._actors)
        if waiting and time.monotonic() - self._started > _PATIENCE:
            rest = " The others go on." if waiting < len(self._actors) else ""
            self._note_once(
                f"{waiting} of {len(self._actors)} actors are not there yet: they open the bundle, or wait until the "
                f"cluster has room for them; each takes {self._takes}.{rest}"
            )

    def _opened(self, actor: _Actor, opened: _Opened) -> None:
        where, run = f"The machine {opened.node} of the Ray cluster", opened.run
        if opened.error or run is None:
            raise D3tomError(f"{where} cannot answer: {opened.error} {_PLACES}")
        if not self.runtime[0]:
            self.runtime = run.backend, run.precision
        expected = replace(self._run, backend=self.runtime[0], precision=self.runtime[1])
        if differing := expected.differing(run):
            raise D3tomError(
                f"{where} would answer otherwise than the others: {listing(differing)} differs. All machines need the "
                "same bundle, d3tom-export and runtime; --backend, --device and --precision say which."
            )
        for sentence in opened.notes:
            self._note_once(sentence)
        actor.node, self._deaths = opened.node, 0

    def _note_once(self, sentence: str) -> None:
        """Say what each actor would say."""
        if sentence not in self._noted:
            self._noted.add(sentence)
            self._note(sentence)

    def _bury(self, actor: _Actor, error: Exception) -> None:
        """Put another in the place of a dead actor, wherever there is room for it; its rows are asked again."""
        import ray

        death = _reason(error)
        with suppress(Exception):  # one that only cannot be reached must not answer any more
            ray.kill(actor.handle)
        if not actor.node and not _with_machine(error):
            self._deaths += 1
            if self._deaths >= _MOST_DEATHS and any(each.node for each in self._actors):
                self._actors.remove(actor)
                self._note_once(
                    f"Actors that open the bundle die, the last one thus: {death}. One less is there; the others go on."
                )
                return
            if self._deaths >= _MOST_DEATHS:
                raise D3tomError(
                    f"{_MOST_DEATHS} actors that opened the bundle died, the last one thus: {death}. Where memory ran "
                    "out, give fewer --jobs; every machine needs d3tom-export with what runs the bundle."
                )
        elif actor.parcel is not None:
            assert self._parcels is not None
            self._parcels.died(
                actor.parcel, f"{death}; it ran on {actor.node}", of_it=not getattr(error, "preempted", False)
            )
        self._actors[self._actors.index(actor)] = self._start()
        self._started = time.monotonic()


def _with_machine(error: Exception) -> bool:
    """Whether an actor was lost with its machine, or cannot be reached: opening the bundle is no cause of that."""
    from ray.exceptions import ActorUnavailableError, NodeDiedError

    if isinstance(error, (ActorUnavailableError, NodeDiedError)) or getattr(error, "preempted", False):
        return True
    return "node has died" in str(error) or "node was terminated" in str(error)


def _machines() -> list[tuple[float, float]]:
    """Cores and GPUs of the cluster's machines."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(float(each.get("CPU", 0)), float(each.get("GPU", 0))) for each in alive]


def _connect(address: str) -> None:
    """Join the cluster at ``address``. Raises :class:`D3tomError` where there is none."""
    import ray

    # A cluster of ours alone tells nobody that it was started.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    alone: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _call_on(address)
        with _signals_kept():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except Exception as error:
        raise D3tomError(
            f"There is no Ray cluster to be joined at --ray {printable(address, 200)}: "
            f"{printable(str(error), 600).rstrip('.') or type(error).__name__}. `ray start --head` starts one and says "
            "its address; `--ray local` starts one of this machine for this batch alone. All machines need the same "
            "versions of Ray and of Python."
        ) from None


def _call_on(address: str) -> None:
    """Raise ``OSError`` where nobody answers at ``HOST:PORT``: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals do what they did before: Ray has an end of its own for SIGTERM."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, kept)


def _reason(error: Exception) -> str:
    """Why an actor died, as Ray has it."""
    text = str(error)
    for begin in ("The actor is dead because ", "The actor died because "):
        _, found, rest = text.partition(begin)
        if found:
            text = rest
            break
    return printable(text, 400).rstrip(".")
