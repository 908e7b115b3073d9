"""The C++ plugin library: built by plain g++, loaded without TensorRT or CUDA, building and running the same plans."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.plugins import embed
from d3tom_export.plugins.archive import pack, unpack
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.launch import MergeSizes, launches, variants, workspace
from tests.plugins import cpp_worker, interpreter
from tests.plugins.cpp_worker import Libraries
from tests.plugins.interpreter import Interpret

SOURCES = Path(__file__).parents[2] / "plugins" / "cpp"
OWN = Path(__file__).parent / "cpp"
SMS = (89, 120)


@pytest.fixture(scope="module")
def headers(cuda_headers: Path) -> list[str]:
    """Compiler options for the headers of TensorRT and CUDA."""
    pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")
    folder = os.environ.get("TENSORRT_INCLUDE_DIR") or _packaged_headers()
    if not folder:
        pytest.skip("TENSORRT_INCLUDE_DIR does not name the folder of TensorRT's headers, which are not ours to ship")
    return ["-isystem", folder, "-isystem", str(cuda_headers)]


def _packaged_headers() -> str | None:
    """TensorRT's headers as kernel-lens carries them; nothing of that package is imported."""
    found = importlib.util.find_spec("kernel_lens")
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "include" / "tensorrt"
        if (folder / "NvInfer.h").is_file():
            return str(folder)
    return None


@pytest.fixture(scope="module")
def kernels(headers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    embed.write_kernels(folder, SMS)
    return folder


@pytest.fixture(scope="module")
def libraries(
    headers: list[str], kernels: Path, cuda_stub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Libraries:
    """The plugin library and its harness, built by g++ with all warnings as errors."""
    folder = tmp_path_factory.mktemp("libraries")
    common = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *headers]
    plugin, autoload = folder / "libd3tom_merge_plugin.so", folder / "libd3tom_merge_plugin_autoload.so"
    made = Libraries(plugin, autoload, cuda_stub, folder / "libharness.so")
    sources = [*map(str, sorted(SOURCES.glob("*.cpp"))), str(kernels / "merge_kernels.S")]
    commands = [
        [*common, "-fvisibility=hidden", *sources, "-o", str(made.plugin), "-ldl"],
        [*common, "-fvisibility=hidden", "-DD3TOM_SELF_REGISTER", *sources, "-o", str(made.autoload), "-ldl"],
        [*common, str(OWN / "harness.cpp"), "-o", str(made.harness), "-ldl"],
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    return made


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


@pytest.mark.parametrize("how", ["load_library", "dlopen"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensorrt_builds_with_the_library(
    libraries: Libraries, headers: list[str], dtype: str, how: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the one that builds without a GPU, is not installed here")
    load = f"trt.get_plugin_registry().load_library({str(libraries.plugin)!r})"
    if how == "dlopen":  # as ONNX Runtime and Triton Inference Server do
        load = f"ctypes.CDLL({str(libraries.autoload)!r})"
    code = (
        "import ctypes; from d3tom_export.engines.toolkit import load_toolkit\n"
        "from tests.plugins.engines import build, merge_model\n"
        "trt = load_toolkit('tensorrt-rtx').trt\n"
        f"{load}\n"
        f"layers, plan = build(trt, merge_model({dtype!r}, 'd3tom_export'), {SMS})\n"
        "assert layers == ['PLUGIN_V3'], layers\n"
        f"open({str(tmp_path / 'plan')!r}, 'wb').write(plan)\n"
    )
    root = Path(__file__).parents[2]
    # Of one name, the Python plugin and the library cannot share a process.
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    if how == "dlopen" and _major(headers) != 11:
        # TensorRT-RTX has TensorRT 11's interfaces: a library of other headers must see it, and not call them.
        assert f"built with headers of TensorRT {_major(headers)}, this process has loaded 1" in done.stderr
        assert done.returncode > 0  # the node found no plugin; a signal would be negative
        return
    assert done.returncode == 0, done.stderr
    from tests.plugins.engines import kernels_in

    held = kernels_in((tmp_path / "plan").read_bytes())  # the Python plugin reads what the library wrote
    assert {kernel for kernel in held if not kernel.portable} == set(compile_kernels(dtype, SMS, 48, 64))
    assert {kernel.variant for kernel in held if kernel.portable} == set(variants(dtype, 48, 64))


CASES = [
    ("float32", MergeSizes(2, 40, 9, 33, 50)),
    ("float16", MergeSizes(97, 7, 2, 16, 16)),
    ("bfloat16", MergeSizes(1, 70, 70, 64, 272)),
]


@pytest.mark.parametrize("own", [True, False], ids=["own kernels", "the Python plugin's"])
@pytest.mark.parametrize(("dtype", "sizes"), CASES, ids=str)
def test_it_launches_as_the_python_plugin_does(
    interpret: Interpret, libraries: Libraries, kernels: Path, dtype: str, sizes: MergeSizes, own: bool
) -> None:
    rng = np.random.default_rng(sizes.visual)
    hidden = rng.normal(size=(sizes.batch, sizes.visual, sizes.width)).astype(np.float32)
    normed = rng.normal(size=(sizes.batch, sizes.visual, sizes.depth)).astype(np.float32)
    kept = np.stack([np.sort(rng.permutation(sizes.visual)[: sizes.kept]) for _ in range(sizes.batch)])
    python = pack(compile_kernels(dtype, (89,), sizes.depth, sizes.width))
    known = (kernels / "merge_kernels.bin").read_bytes() if own else python
    error, merged, launched = interpret(
        cpp_worker.enqueue, libraries, known, None if own else python, 89, hidden, normed, kept, dtype
    )
    assert error == ""
    assert launched == [tuple(step) for step in launches(sizes, dtype)]
    expected, *_ = interpret(interpreter.enqueue, python, 89, hidden, normed, kept, dtype)
    np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("sizes", [case[1] for case in CASES] + [MergeSizes(4, 8192, 8192, 4096, 4096)], ids=str)
def test_it_declares_the_same_workspace(interpret: Interpret, libraries: Libraries, sizes: MergeSizes) -> None:
    assert interpret(cpp_worker.workspace, libraries, sizes) == workspace(sizes).size


def test_what_it_cannot_run_it_names(interpret: Interpret, libraries: Libraries) -> None:
    rows, kept = np.ones((1, 4, 16), np.float32), np.array([[1, 3]])
    archive = pack(compile_kernels("float16", (89,), 16, 16))

    def error(data: bytes, sm: int, hidden: np.ndarray) -> str:
        text, *_ = interpret(cpp_worker.enqueue, libraries, archive, data, sm, hidden, rows, kept, "float16")
        assert isinstance(text, str)
        return text

    assert "compute capability 120; build it again" in error(archive, 120, rows)
    assert "holds no kernel `sum-ragged`" in error(archive, 89, rows[..., :3])
    assert "another version" in error(b"X" + archive[1:], 89, rows)
    assert "cut short" in error(archive[:-40], 89, rows)


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
