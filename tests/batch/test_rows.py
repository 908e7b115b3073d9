"""Rows of a batch: in which order, which lines, and what is wrong with a bad one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from d3tom_export.batch.rows import Row, id_of, open_rows
from d3tom_export.errors import CallError, D3tomError
from tests.conftest import picture


def test_rows_are_lines_in_their_order(data: Path) -> None:
    for source in (data, data / "questions.jsonl"):
        rows = open_rows(source, None)
        found = list(rows)
        assert rows.count() == len(found) == 12
        assert [row.index for row in found] == list(range(12))
        assert [row.number for row in found] == [*range(1, 6), *range(7, 14)]  # the sixth line is blank
        assert list(rows) == found
        asked = rows.ask(found[0])
        assert (asked.line.question, asked.names) == ("What is 0?", ("0.png",))
        assert asked.pictures == (str(data.resolve() / "0.png"),)
        assert len({row.key for row in found}) == 12


def test_bad_rows_say_what_is_wrong(data: Path) -> None:
    rows = open_rows(data, None)
    wrong = {}
    for row in rows:
        try:
            rows.ask(row)
        except D3tomError as error:
            wrong[row.index] = str(error)
    # A picture's content is judged when it is decoded.
    assert wrong.keys() == {4, 6, 9}
    for index, says in ((4, "absent.png does not exist"), (6, "no plain name"), (9, "Expecting property name")):
        assert says in wrong[index]


def test_lines_of_any_length(tmp_path: Path) -> None:
    """One that is too long is a bad row, and the next is where it was."""
    long = json.dumps({"question": "x" * (2 << 20), "image": None})
    (tmp_path / "q.jsonl").write_text(f'{long}\n{{"question": "Last?", "image": null}}')  # without an end, too
    rows = open_rows(tmp_path, None)
    first, last = rows
    assert (last.index, last.number, rows.ask(last).line.question) == (1, 2, "Last?")
    with pytest.raises(D3tomError, match="more than 1,048,576 bytes"):
        rows.ask(first)


def test_what_begins_with_many_blanks_is_no_blank_line(tmp_path: Path) -> None:
    """What is behind them is not looked at, and would be lost without a word."""
    for blank in (" ", "\r"):
        (tmp_path / "q.jsonl").write_text(f'{blank * (2 << 20)}{{"question": "First?"}}\n  \n{{"question": "Last?"}}\n')
        rows = open_rows(tmp_path, None)
        first, last = rows
        assert (last.index, last.number) == (1, 3)
        with pytest.raises(D3tomError, match="cannot be asked"):
            rows.ask(first)


def test_a_bad_row_keeps_its_id() -> None:
    def called(content: str) -> str:
        return id_of(Row(0, 7, "", content.encode()))

    assert called('{"id": "q3", "image": "absent.png", "question": "?"}') == "q3"
    assert called('{"question_id": 12}') == "12"
    assert called('{"image": "a.png"}') == called("{nonsense") == called("[1]") == called('{"id": true}') == "7"
    assert called(json.dumps({"id": "long", "question": "x" * (2 << 20)})) == "7"


def test_pictures_of_an_archive_are_held_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3tom_export.batch.rows._MOST_HELD", 3000)
    with zipfile.ZipFile(tmp_path / "samples.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples.jsonl", json.dumps({"image": ["p.png"] * 64, "question": "What?"}))
        archive.writestr("p.png", bytes(1000))
    rows = open_rows(tmp_path / "samples.zip", None)
    with pytest.raises(D3tomError, match="its pictures have more than 3,000 bytes"):
        rows.ask(next(iter(rows)))


def test_a_pictures_file_may_be_too_large(tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate((64 << 20) + 1)
    rows = open_rows(tmp_path, "What?")
    with pytest.raises(D3tomError, match=r"large\.png has 67,108,865 bytes, at most 67,108,864 are read"):
        rows.ask(next(iter(rows)))


def test_files_of_a_folder_follow_one_another(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    picture(8, 8).save(tmp_path / "images" / "a" / "3.png")
    (tmp_path / "model_samples_b.jsonl").write_text('{"question": "B?"}\n')
    (tmp_path / "model_samples_a.jsonl").write_text('{"doc_id": 3, "input": "A?", "target": "x"}\n')
    rows = open_rows(tmp_path, None)
    asked = [rows.ask(row) for row in rows]
    lines = [(each.line.id, each.line.kind, each.line.question) for each in asked]
    assert lines == [("3", "a", "A?"), ("1", "b", "B?")]
    assert [each.names for each in asked] == [("images/a/3.png",), ()]


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        picture(8, 8).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    rows = open_rows(tmp_path, 'What says "it"?')
    asked = [rows.ask(row) for row in rows]
    assert [each.line.id for each in asked] == ["a.JPG", "b.png", "c.webp"]
    assert {each.line.question for each in asked} == {'What says "it"?'}
    assert asked[0].pictures == (str(tmp_path.resolve() / "a.JPG"),)


def test_a_zip_as_bundles_have_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "samples.zip", "w") as archive:
        archive.writestr("samples.jsonl", '{"image": "p.png", "prompt": "What?"}\n{"image": "q.png", "prompt": "?"}')
        archive.writestr("p.png", b"content")
    for source in (tmp_path, tmp_path / "samples.zip"):
        rows = open_rows(source, None)
        first, second = rows
        assert rows.ask(first).pictures == (b"content",)
        with pytest.raises(D3tomError, match=r"it has no q\.png"):
            rows.ask(second)


def test_what_holds_no_rows(tmp_path: Path) -> None:
    with pytest.raises(D3tomError, match=r"no \*\.jsonl file. Give a question about its pictures with --prompt"):
        open_rows(tmp_path, None)
    with pytest.raises(D3tomError, match="holds no pictures"):
        open_rows(tmp_path, "What?")
    with pytest.raises(D3tomError, match="does not exist"):
        open_rows(tmp_path / "absent.jsonl", None)
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(D3tomError, match="cannot be read"):
        open_rows(tmp_path / "bad.zip", None).count()
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(CallError, match="asks about the pictures of a folder"):
        open_rows(tmp_path / "q.jsonl", "What?")
