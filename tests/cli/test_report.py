"""``report``: what it is called with, what it refuses, and that no page is there unless it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle
from tests.conftest import Invoke, picture


def test_a_page_without_the_eager_model(bundle: Bundle, invoke: Invoke, tmp_path: Path, image: Path) -> None:
    output, data = tmp_path / "a page.html", tmp_path / "data.json"
    output.write_text("former")
    result = invoke(
        "report", bundle.folder, "--output", output, "--image", image, "--prompt", "What?", "--prompt", "Why?",
        "--no-oracle", "--no-parity", "--kv-cache", "--gen-length", 4, "--json", data,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"Wrote {output}" in result.output
    html, found = output.read_text(encoding="utf-8"), json.loads(data.read_text())
    assert "--no-oracle</code> out" in html
    assert "--no-parity</code> out" in html
    assert f"d3tom-export evaluate {bundle.folder.name} --json evaluation.json" in html
    assert [answer["question"] for answer in found["answers"]] == ["What?", "Why?"]
    assert {answer["picture"] for answer in found["answers"]} == {image.name}
    assert found["loop"] == "cached"
    assert found["parity"] is None
    assert found["bytes"] == output.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a page.html", "data.json"]


def test_the_bundles_own_questions_are_asked(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(
        "report", bundle.folder, "--output", tmp_path / "r.html", "--samples", 1, "--no-oracle", "--no-parity",
        "--no-kv-cache", "--schedule", "none", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [answer["question"] for answer in found["answers"]] == ["Describe the picture."]
    assert not any(step["merged"] for step in found["answers"][0]["steps"])
    assert found["reductions"] is None
    assert "There is nothing to count" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_fails_leaves_no_page_and_the_former_one(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.html"
    output.write_text("former")
    shown = tmp_path / "p.png"
    picture(30, 30).save(shown)
    base = ("report", bundle.folder, "--output", output, "--no-oracle", "--no-parity", "--prompt", "What?")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for arguments, words in (
        (("--image", broken), "broken.png"),
        (("--image", shown, "--evaluation", bad), "no result of an evaluation"),
        (("--image", shown, "--evaluation", tmp_path / "none.json"), "none.json"),
    ):
        result = invoke(*base, *arguments)
        assert result.exit_code == 1, result.output
        assert words in result.output

    def fails(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d3tom_export.trust.replace.create_locked", fails)
    result = invoke(*base, "--image", shown, "--gen-length", 2)
    assert result.exit_code == 1
    assert "Give --output another path" in result.output
    assert output.read_text() == "former"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "broken.png", "p.png", "r.html"]


def test_a_folder_that_is_not_there_is_told_before_the_work(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("report", bundle.folder, "--output", tmp_path / "none" / "r.html")
    assert result.exit_code == 1
    assert "is no folder" in result.output
    assert "loading" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "a.png"), "--image needs a question"),
        (("--image", "a", "--image", "b", *("--prompt", "x") * 3), "2 times --image and 3 times --prompt"),
        (("--prompt", "x", "--samples", 2), "--samples asks the bundle's own"),
        (("--model", "m", "--no-oracle", "--no-parity"), "--model is for the PyTorch oracle"),
        (("--vision-tower", "t"), "--vision-tower completes"),
        (("--backend", "pytorch", "--provider", "cuda"), "--provider"),
        (("--samples", 0), "--samples"),
    ],
)
def test_wrong_calls_are_told_apart_from_failures(
    invoke: Invoke, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    result = invoke("report", tmp_path, "--output", tmp_path / "r.html", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_with_what_installs_it(
    invoke: Invoke, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    result = invoke("report", bundle.folder, "--output", tmp_path / "r.html")
    assert result.exit_code == 1
    assert 'pip install "d3tom-export[report]"' in result.output
    assert "loading" not in result.output


def test_without_torch_its_sections_say_what_to_install(
    invoke: Invoke, bundle: Bundle, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3tom_export.report.oracle.has_torch", lambda: False)
    output = tmp_path / "r.html"
    result = invoke(
        "report", bundle.folder, "--output", output, "--image", image, "--prompt", "What?", "--gen-length", 2
    )
    assert result.exit_code == 0, result.output
    html = output.read_text(encoding="utf-8")
    assert html.count("pip install &#34;d3tom-export[build]&#34;") == 3


@pytest.mark.parametrize("same", [True, False])
def test_an_evaluation_of_another_model_is_called_one(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, image: Path, same: bool
) -> None:
    evaluation, output, data = tmp_path / "evaluation.json", tmp_path / "r.html", tmp_path / "data.json"
    row = {"loop": "cached", "exact_match": 0.5, "interval": [0.4, 0.6], "mean_kept": 1, "steps": 4}
    model = str(bundle.folder) if same else "bundles/lavida-r0.9"
    told = {"model": model, "data": "/sets/docvqa", "questions": 1234, "metric": "exact-match", "rows": [row]}
    evaluation.write_text(json.dumps(told))
    result = invoke(
        "report", bundle.folder, "--output", output, "--image", image, "--prompt", "What?", "--no-oracle",
        "--no-parity", "--gen-length", 4, "--evaluation", evaluation, "--json", data,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    html, found = output.read_text(encoding="utf-8"), json.loads(data.read_text())["evaluation"]
    assert (found["data"], found["questions"], found["metric"]) == ("docvqa", 1234, "exact-match")
    assert "<dd>docvqa</dd>" in html
    assert "<dd>1,234</dd>" in html
    assert ("These are answers of lavida-r0.9; everything else" in html) is not same
    assert ("is of lavida-r0.9, not of" in " ".join(result.stderr.split())) is not same
