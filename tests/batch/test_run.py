"""A batch in this process and in several, whatever becomes of those."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import d3tom_export as d3
from d3tom_export.batch import chunks
from d3tom_export.batch.answering import Job
from d3tom_export.batch.chunks import Chunks, useful_jobs
from d3tom_export.batch.faults import is_own
from d3tom_export.batch.parcels import Parcel
from d3tom_export.batch.rows import Asked, Row, Rows, open_rows
from d3tom_export.batch.run import run_batch
from d3tom_export.batch.workers import Workers, _Worker
from d3tom_export.errors import D3tomError, UnexpectedError
from d3tom_export.quality.answering import sample_seed
from tests.batch.conftest import MakeJob
from tests.conftest import picture

BAD = [1, 4, 6, 9]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"seconds": None} for line in path.read_bytes().splitlines()]


def test_rows_are_answered_as_a_model_answers_them(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_MOMENT", 1e9)  # which every machine has time enough in
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
    assert reached == [(0, 12), (2, 12), (10, 12), (12, 12)]
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


def _odd(monkeypatch: pytest.MonkeyPatch, indices: set[int], times: int) -> list[int]:
    """Reading these rows fails, the first ``times`` of each, as a disk fails that is away for a while."""
    failed: list[int] = []
    ask = Rows.ask

    def asked(rows: Rows, row: Row) -> Asked:
        if row.index in indices and failed.count(row.index) < times:
            failed.append(row.index)
            raise OSError(errno.EIO, "Input/output error")
        return ask(rows, row)

    monkeypatch.setattr(Rows, "ask", asked)
    return failed


def test_what_fails_unexpectedly_is_asked_once_more(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch(make_job(), tmp_path / "here.jsonl")
    with monkeypatch.context() as patched:
        failed = _odd(patched, {3, 7}, 1)
        assert run_batch(make_job(), tmp_path / "o.jsonl").failed == 4
    assert failed == [3, 7]
    assert _rows(tmp_path / "o.jsonl") == _rows(tmp_path / "here.jsonl")
    with monkeypatch.context() as patched:
        failed = _odd(patched, {3, 7}, 9)
        assert run_batch(make_job(), tmp_path / "o2.jsonl").failed == 6
    assert failed == [3, 7, 3, 7]
    found = _rows(tmp_path / "o2.jsonl")
    assert found[3] | {"run": "", "key": ""} == {
        "index": 3, "run": "", "key": "", "seconds": None, "id": "q2", "error": "Unexpected OSError: [Errno 5] "
        "Input/output error",
    }  # fmt: skip
    assert run_batch(make_job(), tmp_path / "o2.jsonl", retry_failed=True).failed == 4
    assert _rows(tmp_path / "o2.jsonl") == _rows(tmp_path / "here.jsonl")


def test_a_batch_ends_where_nothing_is_answered_any_more(
    make_job: MakeJob, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"image": "0.png", "question": f"What is {at}?"}) for at in range(20)]
    (data / "questions.jsonl").write_text("\n".join(lines))
    with monkeypatch.context() as patched:
        _odd(patched, set(range(5, 20)), 99)
        with pytest.raises(D3tomError, match=r"8 rows could not be answered, none between.*row 12 \(13\).*Errno 5"):
            run_batch(make_job(), tmp_path / "o.jsonl")
    assert [row["index"] for row in _rows(tmp_path / "o.jsonl")] == list(range(5))
    notes: list[str] = []
    outcome = run_batch(make_job(), tmp_path / "o.jsonl", note=notes.append)
    assert (outcome.before, outcome.failed) == (5, 0)
    assert "--jobs 2 passes such a row over" in notes[1]


def test_failed_rows_are_asked_anew(make_job: MakeJob, data: Path, tmp_path: Path) -> None:
    job = make_job(settings={"gen_length": 4, "temperature": 0.7})
    notes: list[str] = []
    output = tmp_path / "o.jsonl"
    assert run_batch(job, output).failed == 4
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:10]))
    picture(50, 40, 1).save(data / "absent.png")
    picture(60, 40, 2).save(data / "broken.png")
    outcome = run_batch(job, output, jobs=2, retry_failed=True, note=notes.append)
    assert (outcome.rows, outcome.before, outcome.failed) == (12, 6, 2)
    assert "4 of them could not be answered and are asked again." in notes
    run_batch(job, tmp_path / "new.jsonl")
    assert _rows(output) == _rows(tmp_path / "new.jsonl")


def test_whether_a_row_is_at_fault() -> None:
    def raised(cause: BaseException | None) -> D3tomError:
        try:
            try:
                if cause:
                    raise cause
                raise D3tomError("It is too long.")
            except (OSError, MemoryError, ValueError):
                raise D3tomError("It cannot be read.") from None
        except D3tomError as error:
            return error

    own = (raised(None), raised(FileNotFoundError(2, "")), raised(ValueError()), raised(OSError("x")))
    assert all(map(is_own, own))
    odd = (raised(OSError(errno.ESTALE, "")), raised(MemoryError()), UnexpectedError("CUDA"), RuntimeError())
    assert not any(map(is_own, odd))


@pytest.mark.parametrize(
    ("left", "jobs", "batch", "workers", "sizes"),
    [
        (16, 4, 4, 4, [4, 4, 4, 4]),
        (5, 4, 4, 3, [2, 2, 1]),
        (2, 8, 4, 2, [1, 1]),
        (12, 1, 2, 1, [2, 8, 2]),
        (100, 2, 4, 2, [4, 16, 16, 16, 16, 16, 8, 4, 4]),
        (0, 2, 4, 0, []),
    ],
)
def test_few_rows_go_to_all_processes(left: int, jobs: int, batch: int, workers: int, sizes: list[int]) -> None:
    rows = iter([Row(index, index + 1, "", b"") for index in range(left)])
    assert useful_jobs(jobs, left, batch) == workers
    now = [0.0]
    handed, found = Chunks(rows, left, jobs, batch, lambda: now[0]), list[int]()
    for chunk in handed:
        now[0] += 0.1 * len(chunk)
        handed.answered(len(chunk))
        found.append(len(chunk))
    assert found == sizes


@pytest.mark.parametrize(("seconds", "sizes"), [(0.01, [4, 16, 16, 16]), (0.9, [4, 8, 8, 8]), (60.0, [4, 4, 4, 4])])
def test_a_chunk_is_what_takes_a_moment(seconds: float, sizes: list[int]) -> None:
    """Of rows that take long a kill costs a batch, not several; of those that do not, lines are written together."""
    now = [0.0]
    handed = Chunks(iter([Row(index, index + 1, "", b"") for index in range(200)]), 200, 1, 4, lambda: now[0])
    for chunk, size in zip(handed, sizes, strict=False):
        assert len(chunk) == size
        now[0] += seconds * size
        handed.answered(size)


def test_the_others_go_on_where_a_process_dies_as_it_opens(make_job: MakeJob, data: Path) -> None:
    notes: list[str] = []
    workers = Workers(make_job(), 2, 1, notes.append)
    workers._workers[0].process.kill()
    rows = list(open_rows(data, None))
    with workers:
        found = list(workers.answers([[row] for row in rows]))
        assert workers.workers == 1
    assert [row.index for chunk, _ in found for row in chunk] == list(range(12))
    assert [note for note in notes if "The other processes go on." in note] == notes[:1]


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
