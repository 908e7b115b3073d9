"""Ahead-of-time compilation: for every architecture promised, true to the launch plan, the same every time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.plugins import compiled
from d3tom_export.plugins.compiled import PTX_VERSIONS, Compiled, compile_kernels, compile_variant, entry
from d3tom_export.plugins.launch import DTYPES, Variant, spec, variants

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton, which is not installed here"
)
# Every variant in every precision for one Ada and one Blackwell GPU; of the others, the ones a LaViDa merge takes.
CASES = [(sm, variant) for sm in (89, 120) for variant in sorted({v for d in DTYPES for v in variants(d)})]
CASES += [(sm, Variant("nearest-wide", "bfloat16")) for sm in PTX_VERSIONS if sm not in (89, 120)]


@needs_triton
@pytest.mark.parametrize(("sm", "variant"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_parameters_and_launch_are_the_plan_s(sm: int, variant: Variant) -> None:
    built = compile_variant(variant, sm)
    plan = spec(variant)
    assert built.symbol == plan.function
    assert built.parameters[: len(plan.arguments)] == tuple(
        "u32" if name in plan.sizes else "u64" for name in plan.arguments
    )
    assert set(built.parameters[len(plan.arguments) :]) <= {"u64"}
    # The pointers at the end are Triton's; nothing in the kernel reads them.
    for index in range(len(plan.arguments), len(built.parameters)):
        assert built.ptx.count(f"{built.symbol}_param_{index}") == 1
    assert f".reqntid {built.threads}" in built.ptx
    assert f".target sm_{sm}" in built.ptx
    # What every GPU of 8.6 on lets one block have: CUDA programming guide, "Technical Specifications".
    assert built.shared <= 99 * 1024
    assert built.cubin[:4] == b"\x7fELF"


@needs_triton
def test_half_precision_runs_on_tensor_cores_and_float32_is_not_rounded() -> None:
    for dtype, short in (("float16", "f16"), ("bfloat16", "bf16")):
        ptx = compile_variant(Variant("nearest-wide", dtype), 89).ptx
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32" in ptx
        assert "cp.async" in ptx  # rows are fetched ahead of the products
    single = compile_variant(Variant("nearest-wide", "float32"), 89).ptx
    assert "mma" not in single
    assert "tf32" not in single


@needs_triton
def test_aligned_sums_read_sixteen_bytes_at_once() -> None:
    for dtype in DTYPES:
        assert "ld.global.v4.b32" in compile_variant(Variant("sum", dtype), 89).ptx
        assert "ld.global.v4.b32" not in compile_variant(Variant("sum-ragged", dtype), 89).ptx


@needs_triton
def test_another_process_with_an_empty_cache_makes_the_same_bytes(tmp_path: Path) -> None:
    here = compile_variant(Variant("nearest-narrow", "float16"), 89)
    code = (
        "import sys; from d3tom_export.plugins.compiled import compile_variant; "
        "from d3tom_export.plugins.launch import Variant; "
        "built = compile_variant(Variant('nearest-narrow', 'float16'), 89); "
        "sys.stdout.buffer.write(built.cubin + built.ptx.encode())"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == here.cubin + here.ptx.encode()
    assert str(Path(compiled.__file__).parent).encode() not in done.stdout


@needs_triton
def test_an_archive_entry_is_the_cubin_or_the_ptx() -> None:
    built: Compiled = compile_variant(Variant("order", ""), 80)
    assert built.kernel().image == built.cubin
    portable = built.kernel(portable=True)
    assert portable.image == built.ptx.encode() + b"\0"
    assert (portable.sm, portable.portable, portable.scratch) == (80, True, 2)
    names = [(kernel.sm, kernel.variant.name) for kernel in compile_kernels("float16", (89,), 64, 64)]
    assert names == [(89, "nearest-wide"), (89, "nearest-narrow"), (89, "order"), (89, "sum")]


def test_an_unknown_architecture_is_refused_before_triton_sees_it() -> None:
    for sm in (75, 9, 119):
        with pytest.raises(D3tomError, match=f"80, 86.*found {sm}"):
            compile_variant(Variant("order", ""), sm)


def test_missing_triton_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(D3tomError, match=r"pip install triton.*--merge-op onnx"):
        compiled.check_triton()


def test_an_image_with_more_than_one_entry_is_refused() -> None:
    one = ".visible .entry a(\n .param .u64 .ptr .global .align 1 a_param_0,\n .param .u32 a_param_1\n)"
    assert entry(one) == ("a", ("u64", "u32"))
    with pytest.raises(D3tomError, match="found a, a"):
        entry(one + one)
