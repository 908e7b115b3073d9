"""Which form of the plugin runs engines: the library that is named, or Python's; and what is said of a bad name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.archive import pack
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.library import LIBRARY_VARIABLE, register_merge_runtime
from tests.plugins import walker
from tests.plugins.harness import Libraries
from tests.plugins.interpreter import Interpret


def test_the_named_library_runs_the_merges_and_python_without_a_name(
    interpret: Interpret, libraries: Libraries
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, whose registry is asked, is not installed here")
    archive, library = pack(compile_kernels("float16", (89,), 48, 64)), str(libraries.plugin)
    found = interpret(walker.runtimes, libraries, archive, ["", library, library, "", library])
    python, native = ("", True, 4), (library, False, 4)  # a search is two launches, and each row input one
    assert found == [python, native, native, python, native]


class _Toolkit:
    """A TensorRT whose registry takes every library, and knows ``fields`` of its creator; None: no creator."""

    __name__, __version__ = "toolkit", "0"

    def __init__(self, fields: list[str] | None, handle: object = 1) -> None:
        self.fields, self.handle, self.out = fields, handle, 0

    def get_plugin_registry(self) -> Any:
        return self

    def load_library(self, _path: str) -> object:
        return self.handle

    def get_creator(self, *_names: str) -> Any:
        return (
            None if self.fields is None else SimpleNamespace(field_names=[SimpleNamespace(name=n) for n in self.fields])
        )

    def deregister_library(self, _handle: object) -> None:
        self.out += 1


def test_a_library_that_does_not_fit_is_refused_by_name(
    libraries: Libraries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")

    def said(path: Path, toolkit: _Toolkit) -> str:
        monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
        with pytest.raises(D3tomError) as refused:
            register_merge_runtime(toolkit)
        assert f"library {path}, which {LIBRARY_VARIABLE} names" in str(refused.value)
        assert f"unset {LIBRARY_VARIABLE}" in str(refused.value)
        return str(refused.value)

    taken = _Toolkit(["rows"])
    assert "is no file" in said(tmp_path / "nowhere.so", taken)
    assert "cannot be opened" in said(text, taken)
    assert "offers no plugins by `getCreators`" in said(libraries.harness, taken)
    assert "is refused by toolkit 0" in said(libraries.plugin, _Toolkit(["rows"], None))
    for fields, word in ((None, "offers no plugin d3tom_export::D3ToMMerge"), ([], "is of an older d3tom-export")):
        toolkit = _Toolkit(fields)
        assert word in said(libraries.plugin, toolkit)
        assert toolkit.out == 1
