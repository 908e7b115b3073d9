"""The benchmarks behind the graphs for the CPU: what is compared does the same work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cpu_graphs, cpu_kernels, cpu_openvino, cpu_profile
from benchmarks.proportions import SMALL
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cpu.place import UNTUNED
from tests.conftest import raw_config


def test_kernels_of_a_group_give_the_same() -> None:
    found = [*cpu_kernels.attentions(9, 17), *cpu_kernels.products(5), *cpu_kernels.merges(50, 9, 32, 8)]
    rows = cpu_kernels.measure(found, seconds=0.0)
    assert len({row["group"] for row in rows}) == 3
    for row in rows:
        assert row["difference"] < (0.02 if row["kernel"].startswith("int8") else 1e-5), row
    lines = cpu_kernels.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1


def test_every_tuned_stage_is_timed_after_every_rewrite(bundle: Bundle) -> None:
    found = cpu_graphs.measure(bundle, replace(SMALL, config=raw_config()), repeats=1)
    assert list(found) == [key for key, spec in bundle.manifest.stages.items() if spec.name not in UNTUNED]
    *rewritten, _, _ = cpu_graphs.columns(bundle)
    assert list(found["merge"]) == rewritten
    assert "fp32, library" in found["cached_merge"]
    assert list(found["rotate"]) == ["standard", "rotary"]
    assert "| `rotate` |" in cpu_graphs.table(found, cpu_graphs.columns(bundle))


def test_a_profile_accounts_for_all_of_a_stage(bundle: Bundle, tmp_path: Path) -> None:
    times = cpu_profile.node_times(bundle, "merge", "fp32", replace(SMALL, config=raw_config()), 2, tmp_path)
    assert {"FusedMatMul", "Attention", "TopK"} <= set(times)
    kinds = cpu_profile.by_kind(times)
    assert kinds["products"] == pytest.approx(sum(times[name] for name in ("FusedMatMul", "MatMul")))
    named = [name for names in cpu_profile.KINDS.values() for name in names]
    assert len(named) == len(set(named))  # no operator counts twice
    assert kinds["other"] == pytest.approx(sum(time for name, time in times.items() if name not in named))


def test_stages_are_timed_on_openvino(int8_bundle: Bundle) -> None:
    pytest.importorskip("openvino", reason="OpenVINO, which was tried and not kept, is not installed")
    found = cpu_openvino.measure(int8_bundle, SMALL, repeats=1)
    both = [f"ONNX Runtime {precision}" for precision in ("fp32", "int8")]
    assert list(found["front"]) == cpu_openvino.WAYS
    assert list(found["merge"]) == both  # OpenVINO does not know the merge
