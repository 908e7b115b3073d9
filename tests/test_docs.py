"""The page on the Python API and the README: their blocks run, and the page names what there is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import d3tom_export as d3
from d3tom_export.api.settings import SETTINGS
from d3tom_export.bundle.folder import Bundle

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_blocks_run(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as a reader would type them."""
    shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    shutil.copy(ROOT / "examples" / "lavida_tiny" / "pictures" / "digits.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    told = []
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), names)
        told.append(capsys.readouterr().out)
    assert len(BLOCKS) == 7
    first, _, described, asked, stepped, many, refused = told
    assert first.startswith("9 5\n(")
    assert "kv_cache=True" in described
    assert len(asked.splitlines()) == 2
    lines = stepped.splitlines()
    assert lines[0].startswith("1/16 1008 (")
    assert lines[-2].endswith(lines[-1])  # the last step's text is the answer's
    assert "not answered: missing.png does not exist" in many
    assert len(many.splitlines()) == 3
    assert "exceeds this model's limit" in refused


def test_the_readmes_block_runs(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "lavida-tiny-d3tom-l2-r0.9").symlink_to(tiny_bundle.folder)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "2\n"


def test_the_page_names_every_setting_and_every_name() -> None:
    for name in SETTINGS:
        assert f"`{name}`" in PAGE, name
    for name in d3.__all__:
        assert re.search(rf"\b{name}\b", PAGE) or name in ("__version__", "Settings", "Description", "Pictures"), name
    for name in vars(d3.Answer)["__dataclass_fields__"]:
        assert f"`{name}`" in PAGE, name
