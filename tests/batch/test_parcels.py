"""Parcels: in order, a few ahead, and again after a death; and how many actors a cluster has room for."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from d3tom_export.batch.faults import UNEXPECTED
from d3tom_export.batch.output import Run
from d3tom_export.batch.parcels import Parcel, Parcels
from d3tom_export.batch.ray_actors import RayActors, _Actor, _Opened, actors_for
from d3tom_export.batch.rows import Row
from d3tom_export.batch.run import run_batch
from d3tom_export.errors import CallError, D3tomError
from tests.batch.conftest import MakeJob


def _chunks(count: int, size: int = 3) -> list[list[Row]]:
    rows = [Row(index, index + 1, "", b"") for index in range(count * size)]
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _answered(parcel: Parcel) -> list[dict[str, object]]:
    return [{"text": str(row.index)} for row in parcel.rows]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_comes_once_and_in_order_whoever_dies(seed: int) -> None:
    chance, workers = random.Random(seed), 3
    parcels, held, given, deaths = Parcels(_chunks(30), workers), [], [], dict.fromkeys(range(90), 0)
    most = 0
    while not parcels.done:
        given += [(row.index, body) for rows, found in parcels.whole() for row, body in zip(rows, found, strict=True)]
        while len(held) < workers and (parcel := parcels.next()) is not None:
            held.append(parcel)
            most = max(most, max(row.index for row in parcel.rows) - len(given))
        if held:
            parcel = held.pop(chance.randrange(len(held)))
            if chance.random() < 0.3:
                parcels.died(parcel, "signal 9")
                for row in parcel.rows:
                    deaths[row.index] += 1
            else:
                parcels.answered(parcel, _answered(parcel))
        given += [(row.index, body) for rows, found in parcels.whole() for row, body in zip(rows, found, strict=True)]
    assert [index for index, _ in given] == list(range(90))
    assert not held
    assert max(deaths.values()) == 2
    for index, body in given:
        assert body == {"text": str(index)} if deaths[index] < 2 else "died (signal 9)" in body["error"]
    assert most < 3 * (4 * workers + 1)  # chunks ahead of the next one, however long that takes


def test_a_row_that_failed_is_asked_once_more_by_another() -> None:
    parcels = Parcels(_chunks(1), 2)
    first = parcels.next("a")
    assert first is not None
    answers = _answered(first)
    answers[1] = {"error": "odd", UNEXPECTED: True}
    parcels.answered(first, answers, "a")
    assert parcels.next("a") is None
    again = parcels.next("b")
    assert again is not None
    assert [row.index for row in again.rows] == [1]
    parcels.answered(again, [{"error": "odd", UNEXPECTED: True}], "b")
    (chunk,) = parcels.whole()
    assert [("error" in body) for body in chunk[1]] == [False, True, False]
    assert parcels.done


def test_where_one_worker_is_left_it_is_asked_once_more() -> None:
    parcels, sent = Parcels(_chunks(2), 1), list[Parcel]()

    def hear() -> None:
        parcel = sent[-1]
        odd = len(sent) == 1
        parcels.answered(parcel, [{"error": "odd", UNEXPECTED: True}] * 3 if odd else _answered(parcel), "a")

    found = list(parcels.handed_out(["a"], lambda _: True, lambda _, parcel: sent.append(parcel), hear))
    assert [body for _, bodies in found for body in bodies] == [{"text": str(index)} for index in range(6)]
    assert [len(parcel.rows) for parcel in sent] == [3, 3, 1, 1, 1]


def test_preempted_workers_are_not_held_against_their_rows() -> None:
    parcels = Parcels(_chunks(1), 1)
    for _ in range(5):
        parcel = parcels.next()
        assert parcel is not None
        assert (len(parcel.rows), parcel.deaths) == (3, 0)
        parcels.died(parcel, "preempted", of_it=False)
    assert not parcels.done


def test_machines_that_go_while_actors_open_are_no_reason_to_end(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    notes: list[str] = []
    actors = RayActors(make_job(), Run("1", "model", "wording", "settings"), "", 2, notes.append)
    monkeypatch.setattr("ray.kill", lambda _: None)
    monkeypatch.setattr(actors, "_start", lambda: _Actor(None, None))
    actors._actors = [_Actor(None, None), _Actor(None, None)]
    for error in [exceptions.ActorUnavailableError("gone", b"0" * 16), exceptions.NodeDiedError("gone")] * 3:
        actors._bury(actors._actors[0], error)
    actors._actors[1].node = "10.0.0.7"  # it is open
    for _ in range(3):
        actors._bury(actors._actors[0], exceptions.RayActorError())
    assert [actor.node for actor in actors._actors] == ["10.0.0.7"]
    assert len(notes) == 1
    actors._actors = [_Actor(None, None)]
    with pytest.raises(D3tomError, match="3 actors that opened the bundle died"):
        actors._bury(actors._actors[0], exceptions.RayActorError())


def test_no_chunks() -> None:
    assert Parcels([], 2).done
    assert Parcels([], 2).next() is None


@pytest.mark.parametrize(
    ("machines", "jobs", "gpu", "found"),
    [
        ([(2, 0), (4, 0)], None, False, (6, 1)),
        ([(8, 0), (8, 0)], 2, False, (2, 8)),
        ([(3, 0), (3, 0)], 3, False, (3, 1)),  # two cores each would leave one without room
        ([(16, 2), (16, 2), (8, 0)], None, True, (4, 8)),
        ([(16, 2), (16, 2), (8, 0)], 3, True, (3, 8)),
        ([(0, 0), (4, 0)], None, False, (4, 1)),  # a head that takes no work
        ([(2, 0)], 5, False, (5, 1)),  # some wait until the cluster grows
        ([], None, False, (1, 1)),
        ([(0.5, 0)], None, False, (1, 1)),
    ],
)
def test_how_many_actors_of_how_many_cores(
    machines: list[tuple[float, float]], jobs: int | None, gpu: bool, found: tuple[int, int]
) -> None:
    assert actors_for(machines, jobs, gpu) == found


def test_machines_that_would_answer_otherwise_are_named(make_job: MakeJob) -> None:
    here = Run("1", "model", "wording", "settings")
    notes: list[str] = []

    def actors() -> RayActors:
        return RayActors(make_job(), here, "", 2, notes.append)

    def opened(run: Run | None, error: str = "") -> _Opened:
        return _Opened("10.0.0.7 (worker)", error, run, ["The weights are random."])

    ready = actors()
    for _ in range(2):
        ready._opened(_Actor(None, None), opened(Run("1", "model", "wording", "settings", "onnxruntime", "fp32")))
    assert ready.runtime == ("onnxruntime", "fp32")
    assert notes == ["The weights are random."]
    for run, says in (
        (Run("1", "other", "wording", "settings", "onnxruntime", "fp32"), r"the bundle \(there other, here model\)"),
        (Run("2", "model", "wording", "settings", "onnxruntime", "fp32"), r"the version of d3tom-export \(there 2"),
        (Run("1", "model", "wording", "settings", "onnxruntime (cuda)", "fp32"), r"--backend \(there onnxruntime \(cu"),
    ):
        with pytest.raises(D3tomError, match=rf"10\.0\.0\.7 \(worker\) of the Ray .* would answer otherwise.*{says}"):
            ready._opened(_Actor(None, None), opened(run))
    with pytest.raises(D3tomError, match=r"cannot answer: No such folder\. The bundle and --input must be at the same"):
        actors()._opened(_Actor(None, None), opened(None, "No such folder."))


def test_without_ray(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(D3tomError, match=r'not installed here \(.*pip install "d3tom-export\[ray\]"'):
        run_batch(make_job(), tmp_path / "o.jsonl", ray="auto")
    with pytest.raises(CallError, match="--ray is empty"):
        run_batch(make_job(), tmp_path / "o.jsonl", ray="")
    with pytest.raises(CallError, match="5000 processes"):
        run_batch(make_job(), tmp_path / "o.jsonl", 5000, ray="auto")
    assert not (tmp_path / "o.jsonl").exists()
