"""Sets of questions: every format that is read, and what is refused of strangers'."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d3tom_export.bundled import bundled_model
from d3tom_export.errors import D3tomError
from d3tom_export.quality.dataset import DataSet, Item, groups_of, open_data, samples_of
from d3tom_export.quality.lines import kind_of_file, parse_line
from tests.conftest import picture


def _lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def _picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(20, 10, seed).save(path)


def _sizes(data: DataSet) -> list[list[tuple[int, int]]]:
    return [[image.size for image in data.decode(item, data.contents(item))] for item in data.items]


def test_the_bundled_scenes() -> None:
    data = samples_of(bundled_model())
    assert [item.index for item in data.items] == list(range(len(data.items)))
    assert len({item.kind for item in data.items}) > 1
    first = data.items[0]
    contents = data.contents(first)
    (image,) = data.decode(first, contents)
    assert image.size[0] > 1
    assert data.key(first, contents) != data.key(data.items[1], contents)
    assert data.first(2) == data.items[:2]
    assert data.first(None) == data.items
    with pytest.raises(D3tomError, match=r"were asked for\. Ask for fewer with --samples"):
        data.first(len(data.items) + 1)
    assert open_data(bundled_model()).sha256 == data.sha256
    assert open_data(bundled_model() / "samples.zip").sha256 == data.sha256


def test_a_folder_of_lines(tmp_path: Path) -> None:
    _picture(tmp_path / "a" / "one.png")
    _picture(tmp_path / "two.jpg")
    _lines(
        tmp_path / "b.jsonl",
        {"image": "a/one.png", "question": "What?", "answer": "cat", "kind": "animal"},
        {"picture": "two.jpg", "prompt": "How many?", "answers": ["2", "two"], "id": "q-7"},
        {"image": ["a/one.png", "two.jpg"], "question": "Which?", "answer": 3, "question_id": 12},
    )
    _lines(tmp_path / "a.jsonl", {"image": None, "question": "1 + 1?", "answers": [{"answer": "2"}, {"answer": 2.5}]})
    (tmp_path / "readme.txt").write_text("not read")
    data = open_data(tmp_path)
    assert [item.id for item in data.items] == ["1", "1", "q-7", "12"]
    assert [item.index for item in data.items] == [0, 1, 2, 3]
    assert [item.kind for item in data.items] == ["a", "animal", "b", "b"]  # several files name their kinds
    assert [item.answers for item in data.items] == [("2", "2.5"), ("cat",), ("2", "two"), ("3",)]
    assert _sizes(data) == [[], [(20, 10)], [(20, 10)], [(20, 10)] * 2]
    assert [item.kind for item in open_data(tmp_path / "b.jsonl").items] == ["animal", "", ""]
    assert open_data(tmp_path / "b.jsonl").sha256 != data.sha256


def test_what_lmms_eval_logs(tmp_path: Path) -> None:
    """As its tracker writes it: the question as input, the target as Python spells it, no picture."""
    logged = {"filtered_resps": ["x"], "doc_hash": "00", "prompt_hash": "11", "target_hash": "22", "anls": 0.5}
    stem = "20250101_120000_samples_docvqa_val"
    _lines(
        tmp_path / f"{stem}.jsonl",
        {"doc_id": 0, "target": "['0.28', \"it's\"]", "input": "What?\nAnswer shortly.", **logged},
        {"doc_id": 11, "target": "[3, 4]", "arguments": [["Where?", "x"]], **logged},
        {"doc_id": 12, "target": "B", "input": "Text alone?", "image": None, **logged},
    )
    _picture(tmp_path / "images" / "0.png")
    with pytest.raises(D3tomError, match=r"line 2 of 20250101_120000_.*images/11.png or another ending.*under their"):
        open_data(tmp_path)
    _picture(tmp_path / "images" / "docvqa_val" / "11.jpg")
    data = open_data(tmp_path)
    assert [item.pictures for item in data.items] == [("images/0.png",), ("images/docvqa_val/11.jpg",), ()]
    assert [item.answers for item in data.items] == [("0.28", "it's"), ("3", "4"), ("B",)]
    assert [item.question for item in data.items] == ["What?\nAnswer shortly.", "Where?", "Text alone?"]
    assert kind_of_file(stem) == "docvqa_val"
    assert kind_of_file("mine") == "mine"


def test_targets_in_pythons_spelling(tmp_path: Path) -> None:
    targets = ["[{'answer': 'yes', 'answer_id': 1}, {'answer': 'no'}]", "[1, 2.5]", "[unclear] sign", "[a]", "1, 2"]
    _lines(
        tmp_path / "x.jsonl",
        *({"doc_id": at, "target": target, "input": "?", "image": None} for at, target in enumerate(targets)),
    )
    found = [item.answers for item in open_data(tmp_path).items]
    assert found == [("yes", "no"), ("1", "2.5"), ("[unclear] sign",), ("[a]",), ("1, 2",)]


def test_metrics_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    """As lmms-eval logs them, in Python's spelling of JSON."""
    (tmp_path / "x.jsonl").write_text(
        '{"doc_id": 0, "target": "B", "input": "?", "image": null, "anls": NaN, "worst": [-Infinity, Infinity]}'
    )
    assert open_data(tmp_path).items[0].answers == ("B",)


def test_questions_that_share_pictures() -> None:
    shown = [("a",), ("b",), ("a", "c"), (), ("c",), (), ("d",)]
    groups = groups_of([Item(at, str(at), "?", ("x",), "", names) for at, names in enumerate(shown)])
    assert groups[0] == groups[2] == groups[4]
    assert len(set(groups)) == 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": "?"}, "nothing for answer"),
        ({"question": "?", "answer": []}, "for answer"),
        ({"question": "?", "answer": True}, "True for answer"),
        ({"question": "?", "answers": ["a", None]}, "for answer"),
        ({"question": "?", "answer": "x" * 5000}, "5,000 characters"),
        ({"question": "?", "answers": [str(at) for at in range(300)]}, "300 answers"),
        ({"answer": "x"}, "nothing for question"),
        ({"question": 7, "answer": "x"}, "7 for question"),
        ({"question": "  ", "answer": "x"}, "for question"),
        ({"question": "?", "answer": "x", "kind": 1}, "1 for kind"),
        ({"question": "?", "answer": "x", "id": [1]}, "for its id"),
        ({"question": "?", "answer": "x", "image": 3}, "no name of a file"),
        ({"question": "?", "answer": "x", "image": "../x.png"}, "no plain name"),
        ({"question": "?", "answer": "x", "image": "/etc/passwd"}, "no plain name"),
        ({"question": "?", "answer": "x", "image": ["a.png"] * 99}, "99 pictures"),
        ({"doc_id": "../../x", "target": "y", "input": "?"}, "no plain name"),
        ({"doc_id": 1, "target": "[['a'], ['b']]", "input": "?", "image": None}, "for answer"),
        ({"doc_id": 1, "target": "[None]", "input": "?", "image": None}, "for answer"),
        ({"doc_id": 1, "target": "[{'text': 'yes'}]", "input": "?", "image": None}, "for answer"),
        ({"question": "?", "answer": float("nan")}, "nan for answer"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: dict[str, Any], says: str) -> None:
    _lines(tmp_path / "x.jsonl", {"question": "?", "answer": "fine"}, line)
    with pytest.raises(D3tomError, match=f"line 2 of x.jsonl.*{says}.*Expected one JSON object a line"):
        open_data(tmp_path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(D3tomError, match=r"expected \*.jsonl files, found none"):
        open_data(tmp_path)
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(D3tomError, match="has no question"):
        open_data(tmp_path)
    (tmp_path / "x.jsonl").write_text("{'question': 1}")
    with pytest.raises(D3tomError, match=r"line 1 of x\.jsonl"):
        open_data(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"x" * (2 << 20))
    with pytest.raises(D3tomError, match="at most 1,048,576 are read"):
        open_data(tmp_path)
    with pytest.raises(D3tomError, match="does not exist"):
        open_data(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").unlink()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(D3tomError, match="is a named pipe"):
        open_data(tmp_path)
    (tmp_path / "bad.zip").write_bytes(b"PK")
    with pytest.raises(D3tomError, match=r"bad.zip cannot be read"):
        open_data(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("samples.jsonl", "")
    with pytest.raises(D3tomError, match=r"empty.zip has no question"):
        open_data(tmp_path / "empty.zip")
    with pytest.raises(D3tomError, match=r"brings no questions along.*--data DIR"):
        samples_of(tmp_path)


def test_pictures_do_not_lead_out(tmp_path: Path) -> None:
    _picture(tmp_path / "outside.png")
    folder = tmp_path / "set"
    _lines(
        folder / "x.jsonl",
        {"image": "link.png", "question": "?", "answer": "x"},
        {"image": "none.png", "question": "?", "answer": "x"},
        {"image": "x.jsonl", "question": "?", "answer": "x"},
    )
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    data = open_data(folder)
    for item, says in zip(data.items, ("leads out of its folder", "does not exist", "is not a picture"), strict=True):
        with pytest.raises(D3tomError, match=says):
            data.decode(item, data.contents(item))


def test_a_zips_picture_is_missing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("samples.jsonl", json.dumps({"image": "0.png", "prompt": "?", "answer": "x"}))
    data = open_data(tmp_path / "x.zip")
    with pytest.raises(D3tomError, match=r"it has no 0\.png"):
        data.contents(data.items[0])


def test_keys_tell_questions_and_pictures_apart(tmp_path: Path) -> None:
    _picture(tmp_path / "one.png", 1)
    _lines(tmp_path / "x.jsonl", *({"image": "one.png", "question": q, "answer": "x"} for q in ("a", "b")))
    data = open_data(tmp_path)
    one, other = (data.key(item, data.contents(item)) for item in data.items)
    assert one != other
    _picture(tmp_path / "one.png", 2)
    assert data.key(data.items[0], data.contents(data.items[0])) != one


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("question", "prompt", "input", "arguments", "answer", "answers", "target", "doc_id", "id", "image", "kind")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=7))
def test_any_line_is_read_or_refused_in_words(line: dict[str, Any]) -> None:
    try:
        found = parse_line(json.dumps(line).encode(), 3, "kind")
    except (ValueError, D3tomError) as error:
        assert str(error)  # noqa: PT017
    else:
        assert found.question.strip()
        assert found.answers
        assert all(isinstance(answer, str) for answer in found.answers)
