"""``batch``: a file of questions, a folder of pictures, and a command that is killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle
from tests.conftest import Invoke, picture


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"seconds": None} for line in path.read_bytes().splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        picture(40 + 8 * number, 40, number).save(folder / f"{number}.png")
    return folder


def test_questions_of_a_file(bundle: Bundle, pictures: Path, tmp_path: Path, invoke: Invoke) -> None:
    lines = [{"image": f"{number}.png", "question": "What?"} for number in range(4)]
    lines.insert(2, {"image": "absent.png", "question": "What?"})
    (pictures / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = ["batch", bundle.folder, "--input", pictures, "--output", tmp_path / "o.jsonl", "--gen-length", 4]
    result = invoke(*asked, "--json", tmp_path / "o.json")
    assert result.exit_code == 1, result.output
    assert "1 of 5 rows could not be answered" in result.stderr
    assert "Note: row 2 (3): " in result.stderr
    assert "absent.png does not exist" in result.stderr
    assert f"{tmp_path / 'o.jsonl'} has all 5 rows: 5 in " in result.stdout
    found = _rows(tmp_path / "o.jsonl")
    assert [row["index"] for row in found] == list(range(5))
    assert [("error" in row) for row in found] == [False, False, True, False, False]
    outcome = json.loads((tmp_path / "o.json").read_text())
    assert (outcome["rows"], outcome["before"], outcome["failed"]) == (5, 0, 1)
    # What `run` says of each.
    ran = invoke("run", bundle.folder, "--image", pictures / "3.png", "--prompt", "What?", *asked[-2:], "--json", "-")
    assert json.loads(ran.stdout)["token_ids"] == found[4]["token_ids"]
    again = invoke(*asked)
    assert (again.exit_code, "has all 5 rows already" in again.stdout) == (1, True)
    assert "loading" not in again.stderr
    other = invoke(*asked, "--ratio", 0.1)
    assert other.exit_code == 1
    assert "the settings of merging and of the loop" in " ".join(other.stderr.split())
    wording = invoke(*asked, "--no-system")
    assert "how the model is asked (--system)" in " ".join(wording.stderr.split())


def test_answers_are_no_questions(bundle: Bundle, pictures: Path, invoke: Invoke) -> None:
    (pictures / "q.jsonl").write_text('{"image": "0.png", "question": "What?"}\n')
    given = ["batch", bundle.folder, "--gen-length", 4, "--input"]
    among = invoke(*given, pictures, "--output", pictures / "answers.jsonl")
    assert (among.exit_code, "would be one of the files of --input" in among.stderr) == (2, True)
    itself = invoke(*given, pictures / "q.jsonl", "--output", pictures / "q.jsonl")
    assert (itself.exit_code, "is no row of a batch" in itself.stderr) == (1, True)
    assert sorted(path.name for path in pictures.glob("*.jsonl")) == ["q.jsonl"]
    beside = invoke(*given, pictures / "q.jsonl", "--output", pictures / "answers.jsonl")
    assert beside.exit_code == 0, beside.output


def test_the_result_is_not_written_over_questions_or_answers(
    bundle: Bundle, pictures: Path, tmp_path: Path, invoke: Invoke
) -> None:
    question = '{"image": "0.png", "question": "What?"}\n'
    (pictures / "q.jsonl").write_text(question)
    (tmp_path / "link.json").symlink_to(pictures / "q.jsonl")
    given = ["batch", bundle.folder, "--gen-length", 4, "--output", tmp_path / "o.jsonl", "--input"]
    for source, json_file in (
        (pictures / "q.jsonl", pictures / "q.jsonl"),
        (pictures / "q.jsonl", tmp_path / "link.json"),
        (pictures, pictures / "new.jsonl"),
        (pictures, pictures / ".." / "o.jsonl"),
    ):
        result = invoke(*given, source, "--json", json_file)
        assert (result.exit_code, "would be written over" in result.stderr) == (2, True), result.output
    assert (pictures / "q.jsonl").read_text() == question
    assert not (tmp_path / "o.jsonl").exists()


def test_one_question_about_pictures(bundle: Bundle, pictures: Path, tmp_path: Path, invoke: Invoke) -> None:
    given = ["--prompt", "What?", "--output", tmp_path / "o.jsonl", "--jobs", 2, "--gen-length", 4, "--json", "-"]
    result = invoke("batch", bundle.folder, "--input", pictures, *given)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 4
    assert [row["id"] for row in _rows(tmp_path / "o.jsonl")] == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 1, "Give a question about its pictures with --prompt"),
        (["--prompt", "?", "--jobs", 0], 2, "--jobs"),
        (["--prompt", "?", "--jobs", 257], 2, "1 to 256"),
        (["--prompt", "?", "--ray", ""], 2, "--ray is empty"),
        (["--prompt", "?", "--system", "x", "--no-system"], 2, "exclude one another"),
        (["--prompt", "?", "--backend", "pytorch", "--provider", "cuda"], 2, "runs on the CPU"),
        (["--prompt", "?", "--threshold", 0.5], 1, "threshold is for commit rule"),
        (["--prompt", "?", *["--stop", "x"] * 65], 2, "65 times"),
    ],
)
def test_what_cannot_be_asked(
    bundle: Bundle, pictures: Path, tmp_path: Path, arguments: list[object], code: int, says: str, invoke: Invoke
) -> None:
    result = invoke("batch", bundle.folder, "--input", pictures, "--output", tmp_path / "o.jsonl", *arguments)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.stderr.split())
    assert not (tmp_path / "o.jsonl").exists()


def test_ray_is_an_extra(
    bundle: Bundle, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ["--input", pictures, "--prompt", "?", "--output", tmp_path / "o.jsonl", "--ray", "auto"]
    result = invoke("batch", bundle.folder, *given)
    assert result.exit_code == 1
    assert 'pip install "d3tom-export[ray]"' in " ".join(result.stderr.split())
    assert not (tmp_path / "o.jsonl").exists()


def _killed_and_resumed(bundle: Bundle, pictures: Path, output: Path, rows: int, kills: int, *more: str) -> int:
    """Rows in the end, of a command that is killed at so many random moments; how often it was in the middle."""
    lines = [{"image": f"{at % 4}.png", "question": f"What is {at}?", "id": at} for at in range(rows)]
    (pictures / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "d3tom_export", "batch", str(bundle.folder), "--input", str(pictures)]
    command += ["--output", str(output), "--gen-length", "8", "--batch", "1", *more]
    chance, middle = random.Random(rows), 0

    def written() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    for kill in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until = written() + chance.randrange(1, max(2, rows // (2 * kills)))
        deadline = time.monotonic() + 300
        while written() < until and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() / 50)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, kill
        middle += 0 < written() < rows
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "rows already" in done.stderr
    found = _rows(output)
    assert (
        [row["index"] for row in found] == [(row["id"] and int(row["id"])) or 0 for row in found] == list(range(rows))
    )
    assert all("text" in row for row in found)
    return middle


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_batch_goes_on_with_every_row_once(bundle: Bundle, pictures: Path, tmp_path: Path, jobs: int) -> None:
    assert _killed_and_resumed(bundle, pictures, tmp_path / "o.jsonl", 48, 2, "--jobs", str(jobs)) == 2


@pytest.mark.slow
def test_a_thousand_questions_and_twenty_kills(tiny_bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    many = ("--jobs", "2", "--commit", "threshold", "--schedule", "none")
    assert _killed_and_resumed(tiny_bundle, pictures, tmp_path / "o.jsonl", 1000, 20, *many) == 20
