"""Dependencies point one way: each room imports only what lies below it, and no two modules import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from d3tom_export.families.registry import FAMILIES, geometries

ROOT = Path(__file__).parents[1]
PACKAGES = {"d3tom_export": "d3tom_export", "cli": "d3tom_export.cli", "plugins": "d3tom_export.plugins"}
"""The package's folders, and what they are installed as."""

FRAMEWORKS = {"torch", "onnx", "onnx_ir", "onnxruntime", "transformers"}


def _rooms(*names: str) -> set[str]:
    return {f"d3tom_export.{name}" for name in names}


def _all_but(*names: str) -> set[str]:
    """All rooms of the house, and its single modules, but these."""
    entries = [*(ROOT / "d3tom_export").iterdir(), ROOT / "cli", ROOT / "plugins"]
    return _rooms(*{entry.stem for entry in entries if not entry.stem.startswith("_")} - set(names))


# Room -> what it may not import. `click` is the command line's alone; frameworks stay out of what runs a bundle.
FORBIDDEN = {
    "d3tom_export": {"click", "d3tom_export.cli"},
    "d3tom_export/api": {
        *FRAMEWORKS,
        *_rooms("batch", "checkpoint", "cost", "cpu", "diagnosis", "model", "parity", "plugins", "report", "stages"),
    },
    "d3tom_export/backends/choice.py": {*FRAMEWORKS, "numpy", *_all_but("errors")},
    "d3tom_export/backends/onnxruntime_options.py": {"torch", "onnx", "onnxruntime", "d3tom_export.bundle"},
    **{
        f"d3tom_export/backends/onnxruntime{part}.py": {"torch", "onnx", "transformers", "d3tom_export.model"}
        for part in ("", "_loaded", "_package", "_providers", "_sessions", "_stage")
    },
    **{
        f"d3tom_export/backends/tensorrt{part}.py": {
            "torch",
            "onnx",
            "onnxruntime",
            "transformers",
            "d3tom_export.model",
        }
        for part in ("", "_cached", "_dtypes", "_engines", "_loaded", "_memory", "_runner", "_sessions", "_stage")
    },
    "d3tom_export/batch": {
        *FRAMEWORKS,
        *_rooms("backends", "cost", "cpu", "diagnosis", "engines", "export", "model", "parity", "plugins", "report"),
    },
    "d3tom_export/bundle": {
        *FRAMEWORKS,
        "numpy",
        *_rooms("backends", "cost", "diagnosis", "engines", "export", "loop", "model", "parity", "prompt"),
    },
    "d3tom_export/checkpoint": {
        *FRAMEWORKS,
        *_rooms("backends", "bundle", "cost", "diagnosis", "engines", "export", "loop", "model", "parity", "stages"),
    },
    "d3tom_export/checkpoint/tensors.py": {"numpy"},
    "d3tom_export/config.py": {"torch", "numpy", "onnx", "onnxruntime", "click"},
    "d3tom_export/cost": {
        *FRAMEWORKS,
        *_rooms("backends", "diagnosis", "engines", "export", "model", "parity", "prompt", "stages"),
    },
    "d3tom_export/cpu": {"torch", "onnxruntime", *_rooms("backends", "engines", "export")},
    "d3tom_export/cpu/place.py": {"numpy", "onnx", "onnx_ir"},
    "d3tom_export/diagnosis": {"polygraphy", "onnx_graphsurgeon", "tensorrt", "d3tom_export.engines"},
    "d3tom_export/diagnosis/compare.py": {"torch", "onnx", "onnxruntime"},
    "d3tom_export/engines": {"torch", "onnxruntime", *_rooms("backends", "export")},
    "d3tom_export/engines/cuda.py": {"torch", "numpy", *_rooms("backends", "engines")},
    "d3tom_export/export": {"onnxruntime", *_rooms("cost", "diagnosis", "plugins")},
    **{
        f"d3tom_export/export/{name}.py": {*FRAMEWORKS, "numpy", *_rooms("backends", "parity", "prompt", "stages")}
        for name in ("build", "preflight", "request")
    },
    "d3tom_export/export/weights.py": {*FRAMEWORKS, *_rooms("backends", "parity", "prompt", "stages")},
    "d3tom_export/families": {*FRAMEWORKS, "numpy", *_all_but("config", "errors", "families", "trust")},
    "d3tom_export/loop": {
        *FRAMEWORKS,
        *_rooms(
            "backends", "bundle", "checkpoint", "cost", "engines", "export", "families", "model", "parity", "prompt"
        ),
    },
    "d3tom_export/loop/denoise.py": {"d3tom_export.stages"},
    "d3tom_export/merging": {"onnx", "onnxruntime", *_rooms("backends", "stages")},
    "d3tom_export/model": {"onnx", "onnxruntime", *_rooms("bundle", "merging", "stages")},
    "d3tom_export/parity": {*FRAMEWORKS, *_rooms("backends", "cost", "engines", "export", "stages")},
    "d3tom_export/pictures": {*FRAMEWORKS, *_all_but("config", "errors", "front", "pictures", "progress", "trust")},
    "d3tom_export/prompt": {
        *FRAMEWORKS,
        *_rooms("backends", "cost", "diagnosis", "engines", "export", "model", "parity", "stages"),
    },
    "d3tom_export/quality": {
        *FRAMEWORKS,
        *_rooms("backends", "cpu", "diagnosis", "engines", "export", "model", "parity", "stages"),
    },
    "d3tom_export/quality/scoring.py": {"numpy"},
    "d3tom_export/report": {*FRAMEWORKS, *_rooms("backends", "diagnosis", "engines", "model", "plugins", "stages")},
    **{
        f"d3tom_export/report/{name}.py": {"numpy", *_rooms("loop", "parity", "pipeline")}
        for name in ("evaluation", "svg")
    },
    **{
        f"d3tom_export/report/{name}.py": {*_rooms("bundle", "checkpoint", "export", "loop", "parity", "pipeline")}
        for name in ("data", "figures", "page")
    },
    "d3tom_export/serve": {
        *FRAMEWORKS,
        *_rooms("backends", "batch", "checkpoint", "cost", "cpu", "diagnosis", "engines", "export", "loop", "model"),
        *_rooms("parity", "plugins", "quality", "quantize", "report", "stages"),
    },
    # What a request is does not depend on who serves it.
    **{
        f"d3tom_export/serve/{name}.py": {"starlette", "uvicorn", "prometheus_client"}
        for name in ("answering", "failures", "keys", "lengths", "limits", "replies", "requests", "stops")
    },
    "d3tom_export/serve/application.py": {"uvicorn"},
    "d3tom_export/stages": {"onnxruntime", *_rooms("backends", "bundle", "export")},
    "d3tom_export/triton": {
        *FRAMEWORKS,
        *_rooms("batch", "checkpoint", "cost", "cpu", "diagnosis", "export", "loop", "model", "parity", "report"),
    },
    "d3tom_export/trust": {"torch", "onnx", "onnxruntime", *_rooms("config", "checkpoint")},
    "plugins": {
        "torch",
        "click",
        "onnxruntime",
        *_rooms("backends", "bundle", "engines", "export", "model", "stages"),
    },
}

# What single modules of those rooms are there for.
ALLOWED = {
    "d3tom_export/bundle/manifest.py": {"d3tom_export.prompt"},  # how a model is asked is part of what is written
    "d3tom_export/checkpoint/models.py": {"torch", "d3tom_export.model"},  # a checkpoint becomes an eager model
    "d3tom_export/cost/bench.py": {"d3tom_export.backends"},  # it times them
    "d3tom_export/report/oracle.py": {
        "torch",
        "d3tom_export.backends",
        "d3tom_export.model",
    },  # it asks the eager model
    "d3tom_export/parity/precision.py": {"torch"},  # the eager model, held in another precision
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
            name = str(path.relative_to(ROOT))
            assert not parents & (FORBIDDEN[room] - ALLOWED.get(name, set())), f"{name} imports {module}"


def test_no_file_outgrows_five_hundred_lines() -> None:
    for folder in ("d3tom_export", "cli", "plugins", "tests", "examples", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def _modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def _imported(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The package's modules that ``name`` imports anywhere, under TYPE_CHECKING and in functions too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= members & modules.keys() or {base}
    return found & modules.keys() - {name}


def _circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; empty where there are none."""
    left = dict(imports)
    while True:
        bottom = {name for name, below in left.items() if not below & left.keys()}
        if not bottom:
            break
        left = {name: below for name, below in left.items() if name not in bottom}
    path: list[str] = []
    name = min(left, default=None)
    while name is not None and name not in path:
        path.append(name)
        name = min(left[name] & left.keys())
    return [] if name is None else path[path.index(name) :]


def test_no_two_modules_import_each_other() -> None:
    """Nor do more of them in a circle: a type that both sides need lies below both."""
    modules = _modules()
    assert {"d3tom_export.cli.main", "d3tom_export.plugins.kernels", "d3tom_export.loop.denoise"} <= modules.keys()
    assert not _circle({name: _imported(name, path, modules) for name, path in modules.items()})


def test_the_library_stands_without_its_reports() -> None:
    """They stand on all of it, and only the command line on them."""
    modules = _modules()
    for name, path in modules.items():
        if not name.startswith(("d3tom_export.report", "d3tom_export.cli.")):
            assert not [each for each in _imported(name, path, modules) if each.startswith("d3tom_export.report.")], (
                name
            )


def test_the_library_stands_without_its_api() -> None:
    """Which is its front: batches, servers and the command line stand on it, and nothing below it."""
    modules = _modules()
    above = ("d3tom_export.api", "d3tom_export.batch", "d3tom_export.cli", "d3tom_export.serve", "d3tom_export.triton")
    for name, path in modules.items():
        if name not in ("d3tom_export", "d3tom_export.__main__") and not name.startswith(above):
            assert not [each for each in _imported(name, path, modules) if each.startswith(above)], name


def test_a_circle_is_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert not _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def _texts(path: Path) -> Iterator[str]:
    """The string literals of a file that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_families_are_named_in_their_room_only() -> None:
    """The rest of the house asks the family: it knows neither names, nor titles, nor geometries."""
    names = {*FAMILIES, *geometries(), *(family.title for family in FAMILIES.values())}
    assert {"llada", "llada-v", "lavida-dream", "lavida-llada"} <= names
    word = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?![\w-])")
    for path in _modules().values():
        name = str(path.relative_to(ROOT))
        if not name.startswith("d3tom_export/families/"):
            found = {match for text in _texts(path) for match in word.findall(text)}
            assert not found, name
