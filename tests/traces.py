"""Stages' graphs, traced once for all builds of the suite, and for `make slow` and `make fuzz` after `make test`.

Most of a build is tracing, seconds a stage, and the suite's bundles have most of their stages in common. A graph is
taken again only for the same module, contract and places of weights, and as long as no source of ours and no version
of what traces has changed; whatever else a build does, it does each time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import shutil
import time
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor, nn

from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.checkpoint.models import hollow_model
from d3tom_export.checkpoint.quantized import QuantizedTensor
from d3tom_export.config import GenerationConfig, Loop, MergeConfig
from d3tom_export.stages.contract import StageSpec, stage_specs
from d3tom_export.stages.cut import stage_modules
from d3tom_export.stages.export import Weights, export_stage
from d3tom_export.trust.files import write_file

_OF_TORCH = set(vars(nn.Module()))
"""Attributes that every module has: hooks, and what is looked into apart."""


def _described(value: object) -> object:
    """``value`` in JSON's types; two that a trace could tell apart never look alike."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, nn.Module):
        return _module(value)
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = type(value).__name__
        return [kind, *(sorted(map(repr, value)) if kind.endswith("set") else map(_described, value))]
    if isinstance(value, Mapping):
        return [[_described(key), _described(entry)] for key, entry in value.items()]
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return [value.__module__, value.__qualname__]
    if isinstance(value, functools.partial):
        return [_described(value.func), _described(value.args), _described(value.keywords)]
    if isinstance(value, types.MethodType):
        return [_described(value.__func__), type(value.__self__).__qualname__]
    if dataclasses.is_dataclass(value) or isinstance(value, Enum) or hasattr(value, "to_json_string"):
        return repr(value)
    raise TypeError(f"{type(value)} of a stage's module: say here what a trace could see of it")


def _module(module: nn.Module) -> dict[str, object]:
    own = {name: _described(value) for name, value in vars(module).items() if name not in _OF_TORCH}
    hooks = [name for name, value in vars(module).items() if name.endswith("_hooks") and value]
    assert not hooks, f"{type(module)} has {hooks}, which a description would not tell"
    return {
        "type": f"{type(module).__module__}.{type(module).__qualname__}",
        "training": module.training,
        "own": own,
        "buffers": {name: _described(buffer) for name, buffer in module.named_buffers(recurse=False)},
        "modules": {name: _module(child) for name, child in module.named_children()},
    }


def key(stage: StageSpec, module: nn.Module, weights: Weights) -> str:
    """What a trace of a stage could depend on, in a name."""
    places = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored_name, stored = weights[id(parameter)]
        parts = stored.parts if isinstance(stored, QuantizedTensor) else (stored,)
        lies = [(part.file.name, part.file_bytes, part.dtype, part.shape, part.offset, part.length) for part in parts]
        places[name] = [stored_name, str(parameter.dtype), tuple(parameter.shape), *lies]
    description = json.dumps([repr(stage), _module(module), places])
    return hashlib.sha256(description.encode()).hexdigest()[:24]


def kept_folder() -> Path:
    """Where graphs of the sources as they are now are kept from one run to the next; those of a day ago are removed."""
    root = Path(__file__).parents[1]
    state = hashlib.sha256(platform.python_version().encode())
    for package in ("torch", "onnx", "onnx-ir", "onnxscript", "transformers"):
        state.update(f"{package} {version(package)}".encode())
    for path in sorted([*root.glob("d3tom_export/**/*.py"), *root.glob("plugins/**/*.py"), Path(__file__)]):
        state.update(path.read_bytes())
    folder = root / ".pytest_cache" / "traces" / state.hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder and time.time() - other.stat().st_mtime > 86400:
            shutil.rmtree(other, ignore_errors=True)
    return folder


class Traces:
    """A folder of graphs that all processes of the suite share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _graph(self, stage: StageSpec, module: nn.Module, weights: Weights, wait: bool) -> Path | None:
        """The file of a stage's graph, beside one of its weights' names; None where another process is at it."""
        path = self._folder / f"{key(stage, module, weights)}.onnx"
        try:
            with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
                if not path.exists():
                    partial = path.with_suffix(".partial")
                    partial.unlink(missing_ok=True)
                    names = export_stage(stage, module, partial, weights)
                    path.with_suffix(".json").write_text(json.dumps(names))
                    partial.rename(path)
        except Timeout:
            return None
        return path

    def export_stage(self, stage: StageSpec, module: nn.Module, path: Path, weights: Weights) -> list[str]:
        """What a build calls in the place of the product's."""
        graph = self._graph(stage, module, weights, wait=True)
        assert graph is not None
        write_file(path, graph.read_bytes())
        names: list[str] = json.loads(graph.with_suffix(".json").read_text())
        return names

    def help_with(
        self,
        checkpoint: Checkpoint,
        merge: MergeConfig,
        generation: GenerationConfig,
        loops: Sequence[Loop],
        share_prefix: bool = False,
    ) -> None:
        """Trace stages of a bundle that another process is building, from its other end."""
        specs = stage_specs(checkpoint.config, merge, generation.gen_length, loops, share_prefix)
        model = hollow_model(checkpoint)
        modules = stage_modules(model, merge, loops, share_prefix)
        places = {id(parameter): (name, checkpoint.tensors[name]) for name, parameter in model.named_parameters()}
        for name in reversed(modules):
            self._graph(specs[name], modules[name], places, wait=False)
