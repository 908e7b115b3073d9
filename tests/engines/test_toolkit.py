"""Finding TensorRT: the real TensorRT-RTX, and what is said where there is none."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from d3tom_export.engines import toolkit as toolkits
from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.errors import D3tomError


def test_tensorrt_rtx_is_found_and_its_parser_finds_the_library() -> None:
    toolkit = load_toolkit("tensorrt-rtx")
    assert toolkit.ahead_of_time
    assert toolkit.version == toolkit.trt.__version__
    folder = Path(importlib.import_module("tensorrt_rtx_libs").__path__[0])
    assert (folder / "libtensorrt_rtx.so").exists()


@pytest.fixture
def _fresh() -> object:
    """Nothing remembered before and after."""
    load_toolkit.cache_clear()
    yield
    load_toolkit.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(D3tomError, match=r"package tensorrt, which cannot be imported.*d3tom-export\[tensorrt\]"):
        load_toolkit("tensorrt")


@pytest.mark.usefixtures("_fresh")
def test_a_placeholder_package_is_told_from_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(D3tomError, match="placeholder without TensorRT's libraries"):
        load_toolkit("tensorrt")


def test_a_folder_that_cannot_be_written_says_which_link_to_make(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    libraries = ModuleType("tensorrt_rtx_libs")
    libraries.__path__ = [str(tmp_path)]
    (tmp_path / "libtensorrt_rtx.so.1").touch()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_libs", libraries)

    def refuse(source: str, target: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(toolkits.os, "symlink", refuse)
    with pytest.raises(D3tomError, match=r"ln -s libtensorrt_rtx\.so\.1 .*libtensorrt_rtx\.so"):
        toolkits._let_parser_find_library(load_toolkit("tensorrt-rtx").trt)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_libs", libraries)
    toolkits._let_parser_find_library(load_toolkit("tensorrt-rtx").trt)
    assert (tmp_path / "libtensorrt_rtx.so").is_symlink()
