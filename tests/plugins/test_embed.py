"""The command that writes the C++ library's kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from d3tom_export.plugins import embed
from d3tom_export.plugins.archive import unpack
from d3tom_export.plugins.launch import DTYPES, variants

pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["embed", *arguments])
    return embed.main()


def test_it_writes_an_archive_and_the_assembly_that_embeds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'a "quoted" folder'
    assert _run(monkeypatch, "--output", str(folder), "--sm", "89", "--sm", "89", "--no-ptx") == 0
    held = unpack((folder / "merge_kernels.bin").read_bytes())
    wanted = {variant for dtype in DTYPES for variant in variants(dtype)}
    assert {kernel.variant for kernel in held} == wanted
    assert len(held) == len(wanted)
    assert {(kernel.sm, kernel.portable) for kernel in held} == {(89, False)}
    assert r"a \"quoted\" folder/merge_kernels.bin" in (folder / "merge_kernels.S").read_text()
    assert "merge_kernels.S" in capsys.readouterr().out


def test_an_unknown_architecture_fails_with_a_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--output", str(tmp_path), "--sm", "75") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "found 75" in error
    assert not list(tmp_path.iterdir())
