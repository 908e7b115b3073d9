"""The driver's CUDA version, read from the driver itself, and what is said where packages are made for a newer one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d3tom_export import doctor
from d3tom_export.engines import cuda
from d3tom_export.errors import D3tomError


@pytest.mark.parametrize(("number", "expected"), [(12040, "(12, 4)"), (13010, "(13, 1)")])
def test_the_driver_is_asked_without_bindings(tmp_path: Path, number: int, expected: str) -> None:
    """On a library of the driver's name, in a process that finds it where it looks for the driver."""
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("there is no C compiler, or no libcuda.so.1, on this system")
    source = tmp_path / "driver.c"
    source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {number}; return 0; }}\n")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(command, check=True)
    script = """
import sys
sys.modules["cuda.bindings"] = None
from d3tom_export.engines.cuda import driver_version
print(driver_version())
"""
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_a_driver_that_cannot_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        assert name in ("libcuda.so.1", "nvcuda.dll")
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert cuda.driver_version() is None
    assert cuda.driver_too_old() is None
    assert doctor.machine()["nvidia driver"] == "not found"


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of R550 under cuda-bindings as pip resolves them."""
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 4))
    monkeypatch.setattr(cuda, "version", lambda package: {"cuda-bindings": "13.5.0"}[package])


def test_bindings_for_a_newer_cuda_are_refused_before_any_call(
    old_driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched() -> None:
        raise AssertionError("the bindings were asked")

    monkeypatch.setattr(cuda, "_runtime", untouched)
    with pytest.raises(D3tomError) as refusal:
        cuda.gpus()
    assert str(refusal.value) == (
        "The NVIDIA driver here serves CUDA 12.4, and cuda-bindings 13.5.0 are made for CUDA 13. Remedy: pip install "
        '"cuda-bindings<13", and tensorrt-cu12 or tensorrt-rtx-cu12 in place of tensorrt or tensorrt-rtx; or update '
        "the driver."
    )


def test_doctor_names_the_packages_that_fit_the_driver(old_driver: None) -> None:
    pytest.importorskip("tensorrt_rtx", reason="there is no TensorRT-RTX here whose engines could run")
    finding = next(check() for row, check, _ in doctor._CHECKS if row == "tensorrt-rtx")
    assert not finding.usable
    assert "the NVIDIA driver here serves CUDA 12.4, and cuda-bindings 13.5.0 are made for CUDA 13" in finding.found
    assert finding.remedy.startswith('pip install "cuda-bindings<13", and tensorrt-cu12 or tensorrt-rtx-cu12 in place')
    assert doctor.machine()["nvidia driver"] == "serves CUDA 12.4"


@pytest.mark.parametrize(("driver", "bindings"), [((13, 0), "13.5.0"), ((12, 2), "12.9.10"), ((13, 1), "12.9.10")])
def test_a_driver_serves_its_own_major_version_and_older_ones(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int], bindings: str
) -> None:
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(cuda, "version", lambda _: bindings)
    assert cuda.driver_too_old() is None
