"""What is known of an engine beside its plan: its content key, tensors, profile and place in a bundle.

``engines/<engine>-sm<SM>[-sm<SM>...]-<precision>/`` holds, for each stage, ``<key>.plan``, ``<key>.json`` (this
record) and ``<key>.layers.json`` (the layer table). A plan is reused only while every field of its key is what a new
build would have; otherwise the fields that differ are named. Imports no TensorRT.

Records may be a stranger's: their fields are checked, and in a bundle they count only as its manifest lists them, with
their sha256. So is a plan, against its record. But a plan is machine code for the GPU, and what it does is not looked
into: run those of a bundle only if you trust who built it, or build its engines again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from d3tom_export.bundle.manifest import ENGINES_FOLDER, Files, TensorFields, tensor_specs
from d3tom_export.config import Loop
from d3tom_export.engines.shapes import Profile
from d3tom_export.engines.toolkit import ToolkitName
from d3tom_export.errors import D3tomError
from d3tom_export.stages.contract import StageSpec, TensorSpec
from d3tom_export.trust.documents import parse_json
from d3tom_export.trust.files import find_inside, is_there, open_file, read_bytes, relative_name
from d3tom_export.trust.known_hashes import KnownHashes
from d3tom_export.trust.schema import Count, Fields, Sha256, Text, check_kinds

RECORD_SCHEMA = 2
_MOST_BYTES = 4 << 20
"""Of a record. One of 32 layers' keys and values takes 30 kB."""
_MOST_TIMING_BYTES = 1 << 30
"""Of a timing cache."""

EnginePrecision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[EnginePrecision, ...] = get_args(EnginePrecision)
MergeOp = Literal["plugin", "aot", "onnx"]
"""The merge as the plugin, as ahead-of-time plugins inside the engine (TensorRT only), or as standard layers."""
MERGE_OPS: tuple[MergeOp, ...] = get_args(MergeOp)


@dataclass(frozen=True)
class Target:
    """What engines are built for."""

    toolkit: ToolkitName
    sms: tuple[int, ...]
    """Compute capabilities without their dot, ascending: 89 for Ada, 120 for consumer Blackwell. One plan holds kernels
    for all of them and its weights once."""
    precision: EnginePrecision

    @classmethod
    def of(cls, toolkit: ToolkitName, sms: int | Iterable[int], precision: EnginePrecision) -> Target:
        """With ``sms`` in order."""
        return cls(toolkit, (sms,) if isinstance(sms, int) else tuple(sorted(set(sms))), precision)

    @property
    def folder(self) -> str:
        """Where in a bundle its engines lie."""
        return f"{ENGINES_FOLDER}/{self.toolkit}-{'-'.join(f'sm{sm}' for sm in self.sms)}-{self.precision}"

    @property
    def gpus(self) -> str:
        """Its architectures in words."""
        return "+".join(f"SM{sm}" for sm in self.sms)

    def __str__(self) -> str:
        return f"{self.toolkit}, {self.gpus}, {self.precision}"


class _TargetFields(Fields, frozen=True):
    toolkit: ToolkitName
    sms: Annotated[list[Annotated[int, Meta(ge=10, le=999)]], Meta(min_length=1, max_length=16)]
    precision: EnginePrecision


class _ContentFields(Fields, frozen=True, forbid_unknown_fields=False):
    """What is read of an engine's content key; all of it is compared."""

    version: Text
    merge_op: MergeOp
    sizes: dict[Text, Text]
    weights: Text
    plugin: dict[Text, Text | None]


_Shape = Annotated[list[Count], Meta(max_length=8)]


_Profile = dict[Text, Annotated[list[_Shape], Meta(min_length=3, max_length=3)]]


class _RecordFields(Fields, frozen=True):
    schema_version: int
    stage: Text
    key: Text
    loop: Loop | None
    target: _TargetFields
    content: _ContentFields
    inputs: list[TensorFields]
    outputs: list[TensorFields]
    profiles: Annotated[list[_Profile], Meta(min_length=1, max_length=8)]
    plugin_layers: Count
    plan_bytes: Count
    plan_sha256: Sha256


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
    profiles: tuple[Profile, ...]
    """What it serves; two where it runs the prompt as well as steps (:mod:`d3tom_export.engines.stages`)."""
    plugin_layers: int
    """Layers that are plugins: one for each merge node, or three with ahead-of-time ones."""
    plan_bytes: int
    plan_sha256: str

    @property
    def spec(self) -> StageSpec:
        """The engine's tensors as a stage's."""
        return StageSpec(self.stage, self.inputs, self.outputs, self.loop)

    @property
    def needs_plugin(self) -> bool:
        """Whether the merge plugin must be registered before the plan is opened; ahead-of-time ones are inside it."""
        return self.plugin_layers > 0 and self.content["merge_op"] == "plugin"

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": RECORD_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> EngineRecord:
        """The record in ``raw``, whose fields were found to be there and of their kinds (:func:`read_record`)."""
        return cls(
            stage=raw["stage"],
            key=raw["key"],
            loop=raw["loop"],
            target=Target.of(**raw["target"]),
            content=raw["content"],
            inputs=tensor_specs(raw["inputs"]),
            outputs=tensor_specs(raw["outputs"]),
            profiles=tuple(
                {name: tuple(map(tuple, sizes)) for name, sizes in profile.items()}  # type: ignore[misc]
                for profile in raw["profiles"]
            ),
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


def _find(folder: Path, file: Path) -> Path:
    """``file`` of a target's ``folder`` as a regular file inside the bundle."""
    return find_inside(folder.parents[1], f"{folder.parent.name}/{folder.name}/{file.name}")


def read_record(folder: Path, key: str) -> EngineRecord | None:
    """The record of ``key`` in ``folder``, None where there is none of this schema."""
    path = record_file(folder, key)
    if not is_there(folder, path.name) or not is_there(folder, plan_file(folder, key).name):
        return None
    return _parse_record(path, read_bytes(_find(folder, path), _MOST_BYTES))


def _parse_record(path: Path, content: bytes) -> EngineRecord | None:
    """The record in ``content`` of the file ``path``, None where it is of another schema."""
    remedy = f"Delete the folder {path.parent} and build its engines again."
    try:
        raw = parse_json(content)
    except ValueError as error:
        raise D3tomError(f"{path} is not an engine's record: {error}. {remedy}") from None
    if raw.get("schema_version") != RECORD_SCHEMA:
        return None
    check_kinds(raw, _RecordFields, f"{path} is not an engine's record", remedy)
    record = EngineRecord.from_json(raw)
    if record.key != path.stem or Path(record.target.folder).name != path.parent.name:
        raise D3tomError(
            f"{path} is not an engine's record: it tells of {record.key} for {record.target}, which does not lie here. "
            f"{remedy}"
        )
    return record


def built_engines(bundle: Path, listed: Files | None = None) -> dict[Target, dict[str, EngineRecord]]:
    """The engines in a bundle's folder: the records of every target by stage key.

    Only those count that are ``listed`` as they are: others an interrupted build left unfinished. None: any, for
    whoever has just written them.
    """
    found: dict[Target, dict[str, EngineRecord]] = {}
    if listed is None:
        # Folders with a dot are a build's at work.
        plans = bundle.glob(f"{ENGINES_FOLDER}/[!.]*/*.plan")
        names = [f"{ENGINES_FOLDER}/{path.parent.name}/{path.name}" for path in plans]
    else:
        names = [name for name in listed if name.startswith(f"{ENGINES_FOLDER}/") and name.count("/") == 2]
    for plan in (bundle / name for name in sorted(names) if name.endswith(".plan")):
        folder, path = plan.parent, record_file(plan.parent, plan.stem)
        if not is_there(folder, path.name) or not is_there(folder, plan.name):
            continue
        content = read_bytes(_find(folder, path), _MOST_BYTES)
        if listed is not None:
            entry = listed.get(f"{ENGINES_FOLDER}/{folder.name}/{path.name}")
            if entry is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
                continue
        record = _parse_record(path, content)
        if record is not None:
            found.setdefault(record.target, {})[record.key] = record
    return found


def read_timing_cache(path: Path) -> bytes:
    """A timing cache in a bundle's ``engines`` folder, empty where there is none."""
    if not is_there(path.parent, path.name):
        return b""
    return read_bytes(find_inside(path.parents[1], f"{path.parent.name}/{path.name}"), _MOST_TIMING_BYTES)


def check_plan(folder: Path, record: EngineRecord, hashes: KnownHashes | None = None) -> Path:
    """The plan's path, after its size and sha256 were found to be what was built.

    A plan is machine code for the GPU's driver: a damaged one must not reach it. One that ``hashes``, the bundle's,
    know as it is need not be read for that.
    """
    path = plan_file(folder, record.key)
    real = _find(folder, path) if is_there(folder, path.name) else None
    found = real.stat().st_size if real else 0
    if found != record.plan_bytes or real is None:
        raise D3tomError(
            f"Engine {path} is truncated: it has {found:,} bytes, expected {record.plan_bytes:,}. Copy the bundle "
            "again from where it was built, or build its engines again with `d3tom-export build --bundle`."
        )
    hashes = KnownHashes(folder.parents[1], anew=True) if hashes is None else hashes
    with open_file(real) as file:
        whole = hashes.is_sha256(relative_name(path, folder.parents[1]), file, record.plan_sha256)
    if not whole:
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
