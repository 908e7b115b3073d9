"""The output of a batch: a line for each row, whatever happened to the file meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.batch.faults import UNEXPECTED
from d3tom_export.batch.output import Output, Run
from d3tom_export.batch.rows import Rows, open_rows
from d3tom_export.errors import D3tomError

RUN = Run("1", "model", "wording", "settings")


@pytest.fixture
def rows(data: Path) -> Rows:
    return open_rows(data, None)


def _fill(path: Path, rows: Rows, upto: int = 12, run: Run = RUN) -> None:
    with Output(path, run, rows) as output:
        left = list(output.left())
        assert [row.index for row in left] == list(range(output.done, 12))
        output.bind("onnxruntime", "fp32")
        for row in left[: upto - output.done]:
            output.add([row], [{"error": "é\u2028"} if row.index % 5 == 1 else {"text": f'"{row.index}"\n'}])


def test_lines_are_of_rows_in_their_order(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "out.jsonl"
    _fill(path, rows)
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [each["index"] for each in found] == list(range(12))
    assert [each["key"] for each in found] == [row.key for row in rows]
    assert {each["run"] for each in found} == {"1/model/wording/settings/onnxruntime/fp32"}
    with Output(path, RUN, rows) as output:
        assert (output.done, output.failed, list(output.left())) == (12, 3, [])


def test_a_torn_end_is_dropped_wherever_it_is(tmp_path: Path, rows: Rows) -> None:
    """Cut at every byte: what is left is a beginning of what was, and goes on to the same end."""
    path = tmp_path / "out.jsonl"
    _fill(path, rows)
    content = path.read_bytes()
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        _fill(path, rows)
        assert path.read_bytes() == content, cut


@pytest.mark.parametrize("part", ["version", "model", "wording", "settings"])
def test_another_run_does_not_go_on(tmp_path: Path, rows: Rows, part: str) -> None:
    path = tmp_path / "out.jsonl"
    _fill(path, rows, 3)
    before = path.read_bytes()
    with pytest.raises(
        D3tomError, match=r"line 1 is of another run: .*\(there .*, here else\) differs\. Give --output"
    ):
        Output(path, replace(RUN, **{part: "else"}), rows)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_another_runtime_does_not_go_on(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "out.jsonl"
    _fill(path, rows, 3)
    for runtime, says in ((("onnxruntime (cuda)", "fp32"), "--backend"), (("onnxruntime", "int8"), "--precision")):
        with Output(path, RUN, rows) as output, pytest.raises(D3tomError, match=says):
            output.bind(*runtime)


def test_other_rows_are_refused_and_further_ones_answered(tmp_path: Path, data: Path) -> None:
    path, lines = tmp_path / "out.jsonl", (data / "questions.jsonl").read_text()
    (data / "questions.jsonl").write_text("".join(lines.splitlines(keepends=True)[:4]))
    with Output(path, RUN, open_rows(data, None)) as output:
        output.bind("onnxruntime", "fp32")
        for row in list(output.left()):
            output.add([row], [{"text": ""}])
    (data / "questions.jsonl").write_text(lines)  # it has grown
    _fill(path, open_rows(data, None))
    (data / "questions.jsonl").write_text(lines.replace("What is 1?", "What was 1?"))
    with pytest.raises(D3tomError, match="line 3 answers another row: the input's line is another"):
        Output(path, RUN, open_rows(data, None))
    (data / "questions.jsonl").write_text("".join(lines.splitlines(keepends=True)[:4]))
    with pytest.raises(D3tomError, match="line 5 answers another row: the input has no such row"):
        Output(path, RUN, open_rows(data, None))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"important", "is no output of a batch"),
        (b"important\n", "none of a batch"),
        (b'{"a": 1}\n', "is no row of a batch"),
        (b'{"index":0,"run":7}\n', "is no row of a batch"),
        (b"[1]\n", "none of a batch"),
    ],
)
def test_files_of_others_are_not_touched(tmp_path: Path, rows: Rows, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(D3tomError, match=says):
        Output(path, RUN, rows)
    assert path.read_bytes() == content


def test_damage_before_the_end_is_refused(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "out.jsonl"
    _fill(path, rows)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in ([lines[0], *lines[2:]], [lines[0], lines[0], *lines[1:]], [lines[0], b"\xff\n", *lines[2:]]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(D3tomError, match="line 2"):
            Output(path, RUN, rows)


def test_failed_rows_are_asked_anew(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "out.jsonl"
    _fill(path, rows, 10)
    before = path.read_bytes().splitlines(keepends=True)
    path.chmod(0o640)
    with Output(path, RUN, rows) as output:
        output.bind("onnxruntime", "fp32")

        def interrupted() -> None:
            with output.failed_rows() as (failed, take):
                first, second = failed
                assert (first.index, second.index) == (1, 6)
                take([first], [{"text": "now"}])
                assert path.read_bytes() == b"".join(before)  # until it is whole
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        after = path.read_bytes().splitlines(keepends=True)
        assert json.loads(after[1])["text"] == "now"
        assert [*after[:1], *after[2:]] == [*before[:1], *before[2:]]
        assert (output.failed, path.stat().st_mode & 0o777) == (1, 0o640)
        with pytest.raises(D3tomError, match="Another process is writing"):  # the new file is locked, too
            Output(path, RUN, rows)
        for row in list(output.left()):
            output.add([row], [{"error": "still", UNEXPECTED: True}])
    assert [path.name for path in tmp_path.glob(".*")] == []
    with Output(path, RUN, rows) as output:
        assert (output.done, output.failed) == (12, 3)
        with output.failed_rows() as (failed, take):
            for row in failed:
                take([row], [{"text": "at last"}])
    assert b"error" not in path.read_bytes()
    assert path.read_bytes().count(b"\n") == 12


def test_where_there_are_no_locks_its_length_tells_of_another_writer(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3tom_export.trust.journal.try_lock", lambda _: None)
    with Output(tmp_path / "o.jsonl", RUN, rows) as one, Output(tmp_path / "o.jsonl", RUN, rows) as other:
        first, second = next(one.left()), next(one.left())
        one.add([first], [{"text": "mine"}])
        with pytest.raises(D3tomError, match="Its file system has no locks"):
            other.add([next(other.left())], [{"text": "another's"}])
        one.add([second], [{"text": "mine"}])
    assert (tmp_path / "o.jsonl").read_bytes().count(b"mine") == 2


def test_one_process_writes_at_a_time(tmp_path: Path, rows: Rows) -> None:
    def again() -> Any:
        return Output(tmp_path / "out.jsonl", RUN, rows)

    with again(), pytest.raises(D3tomError, match="Another process is writing"):
        again()
    again().close()
