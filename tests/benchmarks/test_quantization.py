"""The quantization benchmark on the synthetic model: every kind is made and compared, and what it says is told."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quantization import HEAD, draw, kinds, line, run
from d3tom_export.config import MergeConfig


def test_every_kind_is_compared(checkpoint_folder: Path, tmp_path: Path) -> None:
    requests = {name: each for name, each in kinds(2).items() if name in ("int4, GPTQ", "int4, zero points", "int8")}
    rows = list(run(checkpoint_folder, requests, 1, 2, tmp_path, MergeConfig(1, 0.7)))
    by_kind = {row["kind"]: row for row in rows}
    assert list(by_kind) == list(requests)
    assert 0 < by_kind["int8"]["weight_error"] < by_kind["int4, zero points"]["weight_error"]
    assert by_kind["int4, GPTQ"]["bits"] < by_kind["int4, zero points"]["bits"] < by_kind["int8"]["bits"]
    assert all(row["steps"] > 0 for row in rows)
    assert len({told.count("|") for told in (*HEAD.splitlines(), *map(line, rows))}) == 1
    assert not list(tmp_path.iterdir())
    picture = tmp_path / "loss.svg"
    draw(picture, "synthetic, 1 question", rows)
    assert all(f">{name}<" in picture.read_text(encoding="utf-8") for name in requests)
