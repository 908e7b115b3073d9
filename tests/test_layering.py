"""Dependencies point one way: each room imports only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> what it may not import. `click` is the command line's alone; frameworks stay out of what runs a bundle.
FORBIDDEN = {
    "d3tom_export/config.py": {"torch", "numpy", "onnx", "onnxruntime", "click"},
    "d3tom_export/trust": {"torch", "onnx", "onnxruntime", "d3tom_export.config", "d3tom_export.checkpoint"},
    "d3tom_export/loop/denoise.py": {"torch", "onnx", "onnxruntime", "d3tom_export.backends", "d3tom_export.stages"},
    **{
        f"d3tom_export/cost/flop{part}.py": {
            "torch",
            "onnx",
            "onnxruntime",
            "d3tom_export.backends",
            "d3tom_export.stages",
        }
        for part in ("s", "_stages", "_figure")
    },
    "d3tom_export/loop/sampling.py": {"torch", "onnx", "onnxruntime"},
    "d3tom_export/loop/step_plan.py": {"torch", "onnx", "onnxruntime"},
    "d3tom_export/prompt/pictures.py": {"torch", "onnx", "onnxruntime", "transformers"},
    "d3tom_export/prompt/chat.py": {"torch", "transformers"},
    "d3tom_export/bundle/folder.py": {"torch", "onnx", "onnxruntime"},
    "d3tom_export/checkpoint/companions.py": {"torch", "onnx", "onnxruntime"},
    **{
        f"d3tom_export/checkpoint/{name}.py": {"torch", "numpy", "onnx", "onnxruntime", "d3tom_export.model"}
        for name in ("foreign", "tensors", "tower", "wrappers")
    },
    "d3tom_export/families": {"torch", "numpy", "onnx", "onnxruntime", "d3tom_export.checkpoint"},
    "d3tom_export/bundle/output.py": {"torch", "onnx", "onnxruntime", "d3tom_export.engines"},
    "d3tom_export/parity/validate.py": {"torch", "onnx", "onnxruntime", "d3tom_export.backends"},
    "d3tom_export/diagnosis/compare.py": {"torch", "onnx", "onnxruntime"},
    "d3tom_export/diagnosis": {"polygraphy", "onnx_graphsurgeon", "tensorrt", "d3tom_export.engines"},
    "d3tom_export/model": {
        "onnx",
        "onnxruntime",
        "d3tom_export.merging",
        "d3tom_export.stages",
        "d3tom_export.bundle",
    },
    "d3tom_export/merging": {"onnx", "onnxruntime", "d3tom_export.backends", "d3tom_export.stages"},
    "d3tom_export/stages": {
        "onnxruntime",
        "d3tom_export.backends",
        "d3tom_export.bundle",
        "d3tom_export.export",
    },
    **{
        f"d3tom_export/backends/{name}.py": {"torch", "onnx", "transformers", "d3tom_export.model"}
        for name in ("onnxruntime", "onnxruntime_package", "onnxruntime_providers", "onnxruntime_sessions")
    },
    "d3tom_export/backends/onnxruntime_stage.py": {"torch", "onnx", "transformers", "d3tom_export.model"},
    "d3tom_export/backends/onnxruntime_options.py": {"torch", "onnx", "onnxruntime", "d3tom_export.bundle"},
    "d3tom_export/bundle/half.py": {"numpy", "onnx", "onnx_ir", "d3tom_export.engines"},
    **{
        f"d3tom_export/backends/tensorrt{part}.py": {
            "torch",
            "onnx",
            "onnxruntime",
            "transformers",
            "d3tom_export.model",
        }
        for part in ("", "_dtypes", "_engines", "_memory", "_runner", "_sessions", "_stage")
    },
    "d3tom_export/engines/cuda.py": {"torch", "numpy", "d3tom_export.backends", "d3tom_export.engines"},
    "d3tom_export": {"click", "d3tom_export.cli"},
    "d3tom_export/cpu": {
        "torch",
        "onnxruntime",
        "d3tom_export.backends",
        "d3tom_export.export",
        "d3tom_export.engines",
    },
    "d3tom_export/cpu/place.py": {"numpy", "onnx", "onnx_ir"},
    "d3tom_export/engines": {"torch", "onnxruntime", "d3tom_export.backends", "d3tom_export.export"},
    "plugins": {
        "torch",
        "click",
        "onnxruntime",
        *(f"d3tom_export.{room}" for room in ("backends", "bundle", "engines", "export", "model", "stages")),
    },
}


def _imports(path: Path) -> set[str]:
    """Every module a file names in an import, wherever in the file, but for those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(tree)
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_downwards(room: str) -> None:
    target = ROOT / room
    files = [target] if target.is_file() else sorted(target.rglob("*.py"))
    assert files
    for path in files:
        # `python -m d3tom_export` is the command line's other door.
        if path.name == "__main__.py":
            continue
        for module in _imports(path):
            parents = {module} | {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
            assert not parents & FORBIDDEN[room], f"{path.relative_to(ROOT)} imports {module}"


def test_no_file_outgrows_five_hundred_lines() -> None:
    for folder in ("d3tom_export", "cli", "plugins", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
