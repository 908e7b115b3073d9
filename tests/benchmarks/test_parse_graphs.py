"""The parser's benchmark: every stage of a bundle, by TensorRT-RTX's own parser, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner

from benchmarks.parse_graphs import main
from d3tom_export.bundle.folder import Bundle


def test_every_stage_is_parsed(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(main, [str(folder)])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines() if " layers in " in line] == [
        *bundle.manifest.stages
    ]
    assert sorted(folder.iterdir()) == before
