"""Files of answers: what is written is read back, a torn end is dropped, nothing of others is written to."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.quality.dataset import Item
from d3tom_export.quality.results import Answered, Binding, Results
from d3tom_export.quality.settings import Setting

BINDING = Binding("model", "data", "wording", "pytorch", "fp32", "1")
SETTINGS = [Setting.of("uncached", merge, GenerationConfig(gen_length=8)) for merge in (None, MergeConfig(1, 0.7))]
ITEMS = [Item(at, f"q{at}", "What?\u2028", ("x", "ÿ"), "", ()) for at in range(3)]


def _answered(setting: Setting, item: Item, text: str = 'said "é"\n') -> Answered:
    return Answered(setting.id, item.index, text, 2, (9, 4), 20, 9, 12345, 0.25)


def _fill(path: Path | None) -> Results:
    results = Results(path, BINDING)
    for item in ITEMS:
        results.know(item, f"key{item.index}")
        for setting in SETTINGS:
            results.add(setting, _answered(setting, item))
    results.close()
    return results


def test_answers_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    written = _fill(path)
    content = path.read_bytes()
    assert len(content.splitlines()) == 1 + len(ITEMS) + len(SETTINGS) + len(ITEMS) * len(SETTINGS)
    with Results(path, BINDING) as found:
        assert found.answers == written.answers
        assert found.has(SETTINGS[1], ITEMS[2])
        assert found.get(SETTINGS[1], ITEMS[2]).mean_kept == pytest.approx(6.5 / 9)
        found.know(ITEMS[0], "key0")
        with pytest.raises(D3tomError, match="other pictures: those of question q1"):
            found.know(ITEMS[1], "other")
    assert path.read_bytes() == content
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["question"] for line in lines if "key" in line] == ["What?\u2028"] * 3
    assert _fill(None).answers == written.answers


def test_a_torn_end_is_dropped_wherever_it_is(tmp_path: Path) -> None:
    """Cut at every byte: what is left is a beginning of what was, and goes on to the same end."""
    path = tmp_path / "answers.jsonl"
    whole = _fill(path)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with Results(path, BINDING) as found:
            assert found.answers.items() <= whole.answers.items()
        assert content.startswith(path.read_bytes())
        assert path.read_bytes().endswith(b"\n")
    path.write_bytes(content[: len(content) // 2])
    with Results(path, BINDING) as results:
        for item in ITEMS:
            results.know(item, f"key{item.index}")
            for setting in SETTINGS:
                if not results.has(setting, item):
                    results.add(setting, _answered(setting, item))
        assert results.answers == whole.answers
    assert path.read_bytes() == content


@pytest.mark.parametrize("field", ["model", "data", "wording", "backend", "precision", "version"])
def test_answers_of_another_evaluation_are_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "answers.jsonl"
    _fill(path)
    before = path.read_bytes()
    with pytest.raises(D3tomError, match=r"another evaluation: .*there .*, here else.* differs\. Give"):
        Results(path, replace(BINDING, **{field: "else"}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"x", b"important", b"important\n", b'{"a": 1}\n', b"\xff\n", b"[1]\n"])
def test_files_of_others_are_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(D3tomError, match="is no results file"):
        Results(path, BINDING)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"nonsense", "damaged"),
        (b"{}", "none of ours"),
        (b'{"text":"x"}', "expected|missing"),
        (b'{"sample":-1,"key":"x"}', "sample"),
    ],
)
def test_damage_before_the_end_is_refused(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "answers.jsonl"
    _fill(path)
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(b"\n".join([first, line, rest]))
    with pytest.raises(D3tomError, match=rf"line 2.*({says})"):
        Results(path, BINDING)


def test_an_answer_without_its_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    _fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"label"' not in line))
    with pytest.raises(D3tomError, match="no line before it tells of"):
        Results(path, BINDING)


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", tmp_path, tmp_path / "none" / "x.jsonl"):
        with pytest.raises(D3tomError, match="cannot be opened"):
            Results(path, BINDING)
    assert not (tmp_path / "target").exists()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    script = (
        "import sys\nfrom pathlib import Path\nfrom d3tom_export.quality.results import Binding, Results\n"
        "Results(Path(sys.argv[1]), Binding('model', 'data', 'wording', 'pytorch', 'fp32', '1'))\nprint('opened')"
    )
    with Results(path, BINDING):
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
        assert "Another process is writing" in done.stderr
    assert subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True).stdout == "opened\n"
