"""What is known of an engine beside its plan: its content key, tensors, profile and place in a bundle.

``engines/<engine>-sm<SM>-<precision>/`` holds, for each stage, ``<key>.plan``, ``<key>.json`` (this record) and
``<key>.layers.json`` (the layer table). A plan is reused only while every field of its key is what a new build would
have; otherwise the fields that differ are named. Imports no TensorRT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from d3tom_export.bundle import ENGINES_FOLDER, file_sha256
from d3tom_export.config import Loop
from d3tom_export.engines.shapes import Profile
from d3tom_export.engines.toolkit import ToolkitName
from d3tom_export.errors import D3tomError
from d3tom_export.stages.contract import TensorSpec
from d3tom_export.trust.documents import read_json

RECORD_SCHEMA = 1

EnginePrecision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[EnginePrecision, ...] = get_args(EnginePrecision)
MergeOp = Literal["plugin", "aot", "onnx"]
"""The merge as the plugin, as ahead-of-time plugins inside the engine (TensorRT only), or as standard layers."""
MERGE_OPS: tuple[MergeOp, ...] = get_args(MergeOp)


@dataclass(frozen=True)
class Target:
    """What engines are built for."""

    toolkit: ToolkitName
    sm: int
    """Compute capability without its dot: 89 for Ada, 120 for consumer Blackwell."""
    precision: EnginePrecision

    @property
    def folder(self) -> str:
        """Where in a bundle its engines lie."""
        return f"{ENGINES_FOLDER}/{self.toolkit}-sm{self.sm}-{self.precision}"

    def __str__(self) -> str:
        return f"{self.toolkit}, SM{self.sm}, {self.precision}"


@dataclass(frozen=True)
class EngineRecord:
    """One engine."""

    stage: str
    """The stage's name in its loop (`front`, `merge`, ...)."""
    key: str
    """The stage's name in the bundle, and of the plan's file."""
    loop: Loop | None
    target: Target
    content: dict[str, Any]
    """What the plan follows from: versions, graph and weights, profile, merge op and its plugin, builder settings."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    """The tensors with the dtypes they have in the engine ("float16", "bfloat16", ...)."""
    profile: Profile
    plugin_layers: int
    """Layers that are plugins: one for each merge node, or three with ahead-of-time ones."""
    plan_bytes: int
    plan_sha256: str

    @property
    def needs_plugin(self) -> bool:
        """Whether the merge plugin must be registered before the plan is opened; ahead-of-time ones are inside it."""
        return self.plugin_layers > 0 and self.content["merge_op"] == "plugin"

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": RECORD_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> EngineRecord:
        def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["axes"]), i["default"]) for i in items)

        return cls(
            stage=raw["stage"],
            key=raw["key"],
            loop=raw["loop"],
            target=Target(**raw["target"]),
            content=raw["content"],
            inputs=tensors(raw["inputs"]),
            outputs=tensors(raw["outputs"]),
            profile={name: tuple(map(tuple, sizes)) for name, sizes in raw["profile"].items()},  # type: ignore[misc]
            plugin_layers=raw["plugin_layers"],
            plan_bytes=raw["plan_bytes"],
            plan_sha256=raw["plan_sha256"],
        )


def graph_file(key: str, target: Target, merge_op: MergeOp) -> str:
    """The file in a bundle that an engine of stage ``key`` is built from. It lies beside the weights, because no ONNX
    reader takes external data from another folder."""
    return f"{key}.{target.precision}-{merge_op}.onnx"


def plan_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.plan"


def record_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def layers_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.layers.json"


def write_record(folder: Path, record: EngineRecord) -> None:
    record_file(folder, record.key).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path, key: str) -> EngineRecord | None:
    """The record of ``key`` in ``folder``, None where there is none of this schema."""
    path = record_file(folder, key)
    if not path.is_file() or not plan_file(folder, key).is_file():
        return None
    raw = read_json(path)
    if raw.get("schema_version") != RECORD_SCHEMA:
        return None
    try:
        return EngineRecord.from_json(raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise D3tomError(
            f"{path} is not an engine's record ({error!r}). Delete the folder {folder} and build its engines again."
        ) from None


def built_engines(bundle: Path) -> dict[Target, dict[str, EngineRecord]]:
    """The engines in a bundle's folder: the records of every target by stage key."""
    found: dict[Target, dict[str, EngineRecord]] = {}
    for path in sorted((bundle / ENGINES_FOLDER).glob("*/*.plan")):
        record = read_record(path.parent, path.stem)
        if record is not None:
            found.setdefault(record.target, {})[record.key] = record
    return found


def check_plan(folder: Path, record: EngineRecord) -> Path:
    """The plan's path, after its size and sha256 were found to be what was built.

    A plan is machine code for the GPU's driver: a damaged one must not reach it.
    """
    path = plan_file(folder, record.key)
    found = path.stat().st_size if path.is_file() else 0
    if found != record.plan_bytes:
        raise D3tomError(
            f"Engine {path} is truncated: it has {found:,} bytes, expected {record.plan_bytes:,}. Copy the bundle "
            "again from where it was built, or build its engines again with `d3tom-export build --bundle`."
        )
    if file_sha256(path) != record.plan_sha256:
        raise D3tomError(
            f"Engine {path} is damaged: its sha256 is not the one it was built with. Copy the bundle again from where "
            "it was built, or build its engines again with `d3tom-export build --bundle`."
        )
    return path


def differing_fields(built: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names, with both values, of the fields in which two content keys differ."""
    lines = []
    for name in sorted({*built, *wanted}):
        old, new = built.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differing_fields(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} ({_short(old)}, now {_short(new)})")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}...{text[-1]}"
