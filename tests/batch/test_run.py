"""A batch in this process and in several, whatever becomes of those."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import d3tom_export as d3
from d3tom_export.batch.answering import Job
from d3tom_export.batch.parcels import Parcel
from d3tom_export.batch.rows import open_rows
from d3tom_export.batch.run import run_batch
from d3tom_export.batch.workers import Workers, _Worker
from d3tom_export.errors import D3tomError
from d3tom_export.quality.answering import sample_seed
from tests.batch.conftest import MakeJob

BAD = [1, 4, 6, 9]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"seconds": None} for line in path.read_bytes().splitlines()]


def test_rows_are_answered_as_a_model_answers_them(make_job: MakeJob, tmp_path: Path) -> None:
    notes: list[str] = []
    reached: list[tuple[int, int]] = []
    job = make_job(settings={"gen_length": 4, "temperature": 0.7, "seed": 5})
    outcome = run_batch(
        job, tmp_path / "o.jsonl", progress=lambda _, done, total: reached.append((done, total)), note=notes.append
    )
    assert (outcome.rows, outcome.before, outcome.failed) == (12, 0, 4)
    found = _rows(tmp_path / "o.jsonl")
    assert [row["index"] for row in found if "error" in row] == BAD
    assert [note.split()[1] for note in notes] == [str(index) for index in BAD]
    assert "picture 1" not in notes[0]
    assert "broken.png" in notes[0]
    assert reached == [(0, 12), (8, 12), (12, 12)]
    rows = open_rows(job.data, None)
    with d3.open(job.bundle, device="cpu", kv_cache=False) as model:
        for row, told in zip(rows, found, strict=True):
            if "error" in told:
                continue
            asked = rows.ask(row)
            seed = sample_seed(5, row.index)
            answer = model.answer(list(asked.pictures), asked.line.question, gen_length=4, temperature=0.7, seed=seed)
            assert told["token_ids"] == list(answer.token_ids)
            assert (told["text"], told["steps"]) == (answer.text, answer.steps)
            assert (told["id"], told["question"], told["image"]) == (
                asked.line.id, asked.line.question, list(asked.names),
            )  # fmt: skip


def test_neither_processes_nor_batches_nor_stops_change_a_row(make_job: MakeJob, tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())  # other tests of this process may keep some
    noisy = {"gen_length": 4, "temperature": 0.7}
    run_batch(make_job(settings=noisy), tmp_path / "here.jsonl")
    expected = _rows(tmp_path / "here.jsonl")
    outcome = run_batch(make_job(settings=noisy, batch=1), tmp_path / "two.jsonl", jobs=2)
    assert (outcome.rows, outcome.failed) == (12, 4)
    assert _rows(tmp_path / "two.jsonl") == expected
    half = (tmp_path / "here.jsonl").read_bytes()[:-700]  # some rows, and a part of one
    (tmp_path / "half.jsonl").write_bytes(half)
    outcome = run_batch(make_job(settings=noisy, batch=3), tmp_path / "half.jsonl", jobs=2)
    assert 0 < outcome.before < 12
    assert outcome.failed == 4  # those of both runs
    assert _rows(tmp_path / "half.jsonl") == expected
    again = run_batch(make_job(settings=noisy), tmp_path / "half.jsonl")
    assert (again.before, again.failed) == (12, 4)
    assert not set(multiprocessing.active_children()) - others


def _deadly(monkeypatch: pytest.MonkeyPatch, indices: set[int], times: int) -> list[int]:
    """Processes that are given a row of ``indices`` are killed, the first ``times`` of each."""
    killed: list[int] = []
    send = Workers._send

    def deadly(workers: Workers, worker: _Worker, parcel: Parcel) -> None:
        send(workers, worker, parcel)
        for row in parcel.rows:
            if row.index in indices and killed.count(row.index) < times:
                killed.append(row.index)
                worker.process.kill()

    monkeypatch.setattr(Workers, "_send", deadly)
    return killed


def test_what_a_dead_process_had_is_asked_again(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch(make_job(), tmp_path / "here.jsonl")
    killed = _deadly(monkeypatch, {3, 10}, 1)
    run_batch(make_job(batch=1), tmp_path / "two.jsonl", jobs=2)
    assert sorted(killed) == [3, 10]
    assert _rows(tmp_path / "two.jsonl") == _rows(tmp_path / "here.jsonl")


def test_a_row_that_kills_every_process_is_passed_over(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch(make_job(), tmp_path / "here.jsonl")
    killed = _deadly(monkeypatch, {3}, 9)
    outcome = run_batch(make_job(batch=1), tmp_path / "two.jsonl", jobs=2)
    assert killed == [3, 3]
    assert outcome.failed == 5
    expected, found = _rows(tmp_path / "here.jsonl"), _rows(tmp_path / "two.jsonl")
    assert "died (signal 9, SIGKILL)" in found[3]["error"]
    assert [*found[:3], *found[4:]] == [*expected[:3], *expected[4:]]


def test_processes_that_cannot_open_the_bundle_end_the_batch(make_job: MakeJob, tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())  # other tests of this process may keep some
    with pytest.raises(D3tomError, match="is not a bundle"), Workers(make_job(bundle=tmp_path), 2, 1, print):
        pass
    assert not set(multiprocessing.active_children()) - others


@pytest.mark.parametrize(
    ("changes", "jobs", "says"),
    [
        ({}, 0, "0 processes"),
        ({"batch": 0}, 1, "0 answers at once"),
        ({"settings": {"ratio": 2.0}}, 1, "outside"),
        ({"opening": {"backend": "x"}}, 1, "none of auto"),
        ({"data": Path("absent.jsonl")}, 1, "does not exist"),
        ({"data": Path("/dev/null")}, 1, "is a device"),
    ],
)
def test_what_cannot_be_asked_leaves_no_output(
    make_job: MakeJob, tmp_path: Path, changes: dict[str, Any], jobs: int, says: str
) -> None:
    job: Job = make_job(**changes)
    with pytest.raises(D3tomError, match=says):
        run_batch(job, tmp_path / "o.jsonl", jobs)
    assert not (tmp_path / "o.jsonl").exists()
