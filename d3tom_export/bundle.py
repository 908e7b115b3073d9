"""A bundle: everything one merged model needs to run, in a folder with a manifest. Imports no framework.

The folder is a checkpoint too (``config.json``, ``model.safetensors``, ``tokenizer.json``): the graphs' external data
are the tensors of its safetensors file, each stored once under its released name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig, read_json
from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.contract import StageSpec, TensorSpec

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds; see :meth:`Manifest.to_json` for its spelling."""

    model_name: str
    vocab_rows: int
    merge: MergeConfig
    generation: GenerationConfig
    drop_token_after_image: bool
    precision: str
    kv_cache: bool
    opset: int
    stages: dict[str, StageSpec]
    stage_weights: dict[str, list[str]]
    created_by: dict[str, str]
    validation: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {"name": self.model_name, "vocab_rows": self.vocab_rows},
            "merge": self.merge.to_json(),
            "generation": self.generation.to_json(),
            "prompt": {"drop_token_after_image": self.drop_token_after_image},
            "precision": self.precision,
            "kv_cache": self.kv_cache,
            "opset": self.opset,
            "stages": {
                name: {
                    "file": stage_file(name),
                    "inputs": [asdict(tensor) for tensor in spec.inputs],
                    "outputs": [asdict(tensor) for tensor in spec.outputs],
                    "weights": self.stage_weights[name],
                }
                for name, spec in self.stages.items()
            },
            "created_by": self.created_by,
            "validation": self.validation,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Manifest:
        def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["axes"]), i["default"]) for i in items)

        return cls(
            model_name=raw["model"]["name"],
            vocab_rows=raw["model"]["vocab_rows"],
            merge=MergeConfig(**raw["merge"]),
            generation=GenerationConfig(**raw["generation"]),
            drop_token_after_image=raw["prompt"]["drop_token_after_image"],
            precision=raw["precision"],
            kv_cache=raw["kv_cache"],
            opset=raw["opset"],
            stages={
                name: StageSpec(name, tensors(entry["inputs"]), tensors(entry["outputs"]))
                for name, entry in raw["stages"].items()
            },
            stage_weights={name: entry["weights"] for name, entry in raw["stages"].items()},
            created_by=raw["created_by"],
            validation=raw["validation"],
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were verified."""

    folder: Path
    manifest: Manifest
    config: ModelConfig

    def stage_path(self, name: str) -> Path:
        return self.folder / stage_file(name)


def stage_file(stage: str) -> str:
    return f"{stage}.onnx"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` with size and sha256 of every other file in ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    text = json.dumps(manifest.to_json() | {"files": files}, indent=2) + "\n"
    temporary = folder / f".{MANIFEST_FILE}.{uuid.uuid4().hex}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / MANIFEST_FILE)


def _broken_files(folder: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {entry['bytes']:,}"
        elif _sha256(path) != entry["sha256"]:
            yield f"{name} does not match its sha256"


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle after verifying every file's size and sha256 against the manifest."""
    if not (folder / MANIFEST_FILE).is_file():
        raise D3tomError(
            f"{folder} is not a bundle: it has no {MANIFEST_FILE}. Give the folder that `d3tom-export build` wrote."
        )
    raw = read_json(folder / MANIFEST_FILE)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise D3tomError(
            f"{folder} has manifest schema version {raw.get('schema_version')!r}, this tool reads {SCHEMA_VERSION}. "
            "Rebuild the bundle with this version of d3tom-export."
        )
    try:
        manifest, files = Manifest.from_json(raw), dict(raw["files"])
    except (KeyError, TypeError, AttributeError) as error:
        raise D3tomError(f"{folder / MANIFEST_FILE} is incomplete ({error!r}). Rebuild the bundle.") from None
    broken = list(_broken_files(folder, files))
    if broken:
        raise D3tomError(
            f"Bundle {folder} is damaged: {listing(broken)}. Copy it again from where it was built, or rebuild it."
        )
    config = ModelConfig.from_json(read_json(folder / "config.json"), manifest.vocab_rows, str(folder / "config.json"))
    return Bundle(folder, manifest, config)


def check_output_folder(output: Path, force: bool) -> None:
    """Refuse an output folder that exists, unless ``force`` may replace it because it is a bundle."""
    if not output.exists():
        return
    if not force:
        raise D3tomError(f"Output folder {output} exists. Give another with --output, or --force to replace it.")
    if not (output / MANIFEST_FILE).is_file():
        raise D3tomError(
            f"Output folder {output} exists and is not a bundle (no {MANIFEST_FILE}), so --force does not replace it. "
            "Give another folder with --output, or remove it yourself."
        )


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling to fill; it becomes ``output`` when the block ends well, and vanishes otherwise."""
    check_output_folder(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        check_output_folder(output, force)  # it may have appeared meanwhile
        if output.exists():
            replaced = temporary.with_name(temporary.name + "-replaced")
            output.rename(replaced)
            temporary.rename(output)
            shutil.rmtree(replaced)
        else:
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
