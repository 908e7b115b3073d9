"""The C++ plugin library: built by plain g++, loaded without TensorRT or CUDA, building the same plans."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d3tom_export.plugins.archive import unpack
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.launch import DTYPES, variants
from tests.plugins.building import SMS, SOURCES
from tests.plugins.harness import Libraries


def test_it_links_to_neither_tensorrt_nor_cuda(libraries: Libraries) -> None:
    dynamic = subprocess.run(["readelf", "-d", libraries.plugin], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    assert needed
    assert not [name for name in needed if re.search("nvinfer|tensorrt|cuda", name)]
    listed = subprocess.run(["nm", "-D", "--defined-only", libraries.plugin], capture_output=True, text=True).stdout
    assert {"getCreators", "setLoggerFinder"} <= set(re.findall(r" T (\w+)", listed))
    assert "d3tom_merge_kernels" not in listed


def test_opened_without_tensorrt_it_says_so(libraries: Libraries) -> None:
    code = f"import ctypes; ctypes.CDLL({str(libraries.autoload)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "D3ToMMerge: not registered: this process has loaded no TensorRT that fits" in done.stderr


def test_it_carries_every_kernel_and_ptx_for_later_gpus(kernels: Path) -> None:
    held = unpack((kernels / "merge_kernels.bin").read_bytes())
    wanted = {variant for dtype in ("float32", "float16", "bfloat16") for variant in variants(dtype)}
    for sm in SMS:
        assert {kernel.variant for kernel in held if (kernel.sm, kernel.portable) == (sm, False)} == wanted
    ptx = [kernel for kernel in held if kernel.portable]
    assert {kernel.variant for kernel in ptx} == wanted
    assert all(kernel.image.endswith(b"\0") and b".target sm_80" in kernel.image for kernel in ptx)


def _major(headers: list[str]) -> int:
    """The major version of TensorRT's headers."""
    text = (Path(headers[1]) / "NvInferVersion.h").read_text(encoding="utf-8")
    found = re.search(r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", text)
    assert found is not None
    return int(found[1])


def _in_a_process(*lines: str) -> subprocess.CompletedProcess[str]:
    """``lines`` with TensorRT-RTX as ``trt``: of one name, the Python plugin and the library share none."""
    start = (
        "import ctypes; from d3tom_export.engines.toolkit import load_toolkit",
        "from tests.plugins.engines import build, merge_model",
        "trt = load_toolkit('tensorrt-rtx').trt",
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", "\n".join((*start, *lines))]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_tensorrt_builds_with_the_library(libraries: Libraries, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the one that builds without a GPU, is not installed here")
    done = _in_a_process(
        f"trt.get_plugin_registry().load_library({str(libraries.plugin)!r})",
        f"for dtype in {DTYPES}:",
        f"    layers, plan = build(trt, merge_model(dtype, 'd3tom_export', further=(16,)), {SMS})",
        "    assert layers == ['PLUGIN_V3'], layers",
        f"    open({str(tmp_path)!r} + '/' + dtype, 'wb').write(plan)",
    )
    assert done.returncode == 0, done.stderr
    from tests.plugins.engines import kernels_in

    for dtype in DTYPES:
        held = kernels_in((tmp_path / dtype).read_bytes())  # the Python plugin reads what the library wrote
        assert {kernel for kernel in held if not kernel.portable} == set(compile_kernels(dtype, SMS, 48, 64))
        assert {kernel.variant for kernel in held if kernel.portable} == set(variants(dtype, 48, 64))


def test_opened_alone_it_registers_itself(libraries: Libraries, headers: list[str]) -> None:
    """As ONNX Runtime and Triton Inference Server do."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the one that builds without a GPU, is not installed here")
    done = _in_a_process(
        f"ctypes.CDLL({str(libraries.autoload)!r})",
        f"layers, plan = build(trt, merge_model('float16', 'd3tom_export'), {SMS})",
        "assert layers == ['PLUGIN_V3'] and plan, layers",
    )
    if _major(headers) != 11:
        # TensorRT-RTX has TensorRT 11's interfaces: a library of other headers must see it, and not call them.
        assert f"built with headers of TensorRT {_major(headers)}, this process has loaded 1" in done.stderr
        assert done.returncode > 0  # the node found no plugin; a signal would be negative
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake here")
def test_cmake_builds_it(headers: list[str], kernels: Path, tmp_path: Path) -> None:
    given = [f"-DTENSORRT_INCLUDE_DIR={headers[1]}", f"-DCUDA_INCLUDE_DIR={headers[3]}", f"-DD3TOM_KERNELS={kernels}"]
    subprocess.run(["cmake", "-S", SOURCES, "-B", tmp_path, *given], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    for name in ("libd3tom_merge_plugin.so", "libd3tom_merge_plugin_autoload.so"):
        assert (tmp_path / name).stat().st_size > (kernels / "merge_kernels.bin").stat().st_size
    refused = subprocess.run(["cmake", "-S", SOURCES, "-B", tmp_path / "x"], capture_output=True, text=True, env={
        name: value for name, value in os.environ.items() if name != "TENSORRT_INCLUDE_DIR"
    })  # fmt: skip
    assert refused.returncode != 0
    assert "holds no NvInferRuntime.h" in refused.stderr
