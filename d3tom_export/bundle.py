"""A bundle: everything one merged model needs to run, in a folder with a manifest. Imports no framework.

The folder is a checkpoint too (``config.json``, safetensors in one file or in shards, ``tokenizer.json``): the graphs'
external data are the tensors of its safetensors files, each stored once under its released name and in its own dtype.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d3tom_export.checkpoint import CONFIG_FILE, read_array, stored_tensors
from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig, ModelConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.contract import StageSpec, TensorSpec
from d3tom_export.trust.documents import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 3
ENGINES_FOLDER = "engines"
"""Where a bundle keeps engines (engines/record.py)."""


WeightsOrigin = Literal["checkpoint", "random", "zeros"]


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds; see :meth:`Manifest.to_json` for its spelling."""

    model_name: str
    bundled_digest: str | None
    """Of the packaged model's weights, where the bundle was built from it (:mod:`d3tom_export.bundled`)."""
    vocab_rows: int
    weights: WeightsOrigin
    """Where the weights came from: a checkpoint, or a geometry's random or zero ones, whose answers mean nothing."""
    merge: MergeConfig
    generation: GenerationConfig
    drop_token_after_image: bool
    precision: str
    loops: tuple[Loop, ...]
    """The loops it has stages for; ``kv_cache`` false, true or "both" in the file."""
    opset: int
    stages: dict[str, StageSpec]
    stage_weights: dict[str, list[str]]
    created_by: dict[str, str]
    validation: dict[str, Any] | None = None
    source: dict[str, str] | None = None
    """The checkpoint it was built from, where that is a folder of the user's: ``folder`` and ``fingerprint``
    (:mod:`d3tom_export.parity.source`)."""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": self.model_name,
                "bundled_digest": self.bundled_digest,
                "vocab_rows": self.vocab_rows,
                "weights": self.weights,
                "source": self.source,
            },
            "merge": self.merge.to_json(),
            "generation": self.generation.to_json(),
            "prompt": {"drop_token_after_image": self.drop_token_after_image},
            "precision": self.precision,
            "kv_cache": "both" if len(self.loops) > 1 else "cached" in self.loops,
            "opset": self.opset,
            "stages": {
                key: {
                    "file": stage_file(key),
                    "name": spec.name,
                    "loop": spec.loop,
                    "inputs": [asdict(tensor) for tensor in spec.inputs],
                    "outputs": [asdict(tensor) for tensor in spec.outputs],
                    "weights": self.stage_weights[key],
                }
                for key, spec in self.stages.items()
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
            bundled_digest=raw["model"]["bundled_digest"],
            vocab_rows=raw["model"]["vocab_rows"],
            weights=raw["model"]["weights"],
            merge=MergeConfig.from_json(raw["merge"]),
            generation=GenerationConfig(**raw["generation"]),
            drop_token_after_image=raw["prompt"]["drop_token_after_image"],
            precision=raw["precision"],
            loops=LOOPS if raw["kv_cache"] == "both" else ("cached",) if raw["kv_cache"] else ("uncached",),
            opset=raw["opset"],
            stages={
                key: StageSpec(entry["name"], tensors(entry["inputs"]), tensors(entry["outputs"]), entry["loop"])
                for key, entry in raw["stages"].items()
            },
            stage_weights={key: entry["weights"] for key, entry in raw["stages"].items()},
            created_by=raw["created_by"],
            validation=raw["validation"],
            source=raw["model"].get("source"),
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were verified."""

    folder: Path
    manifest: Manifest
    config: ModelConfig

    def stages(self, loop: Loop) -> dict[str, Path]:
        """The graphs of one loop by stage name, those that both loops share among them."""
        return {
            spec.name: self.folder / stage_file(key)
            for key, spec in self.manifest.stages.items()
            if spec.loop in (None, loop)
        }

    def image_newline(self) -> NDArray[np.float32]:
        """(D,) the vector that closes every row of a picture's tokens, read from the weights."""
        return read_array(stored_tensors(self.folder)["model.image_newline"])

    def choose_loop(self, kv_cache: bool | None) -> Loop:
        """The loop to run: with a KV cache, without, or (None) the first one that the bundle has."""
        loops = self.manifest.loops
        if kv_cache is None:
            return loops[0]
        loop: Loop = "cached" if kv_cache else "uncached"
        if loop not in loops:
            raise D3tomError(
                f"{self.folder} was built {'without' if kv_cache else 'with'} KV cache and has no stages for the "
                f"other loop. Build it with --kv-cache both, or leave {'--kv-cache' if kv_cache else '--no-kv-cache'} "
                "out."
            )
        return loop


def stage_file(key: str) -> str:
    return f"{key}.onnx"


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


Files = dict[str, dict[str, Any]]
"""What a manifest lists: ``bytes`` and ``sha256`` by path within the bundle."""


def listed_files(folder: Path) -> Files:
    """The files that the manifest in ``folder`` lists."""
    return dict(read_json(folder / MANIFEST_FILE)["files"])


def weight_files(files: Files) -> list[str]:
    """Names of the weight files among ``files``."""
    return sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)


def weights_sha256(files: Files) -> str:
    """One sha256 for all weights of a bundle: of its only file, or of the list of its shards and theirs."""
    shards = {name: files[name]["sha256"] for name in weight_files(files)}
    if len(shards) == 1:
        return next(iter(shards.values()))
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in shards.items()).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest, known: Files | None = None) -> None:
    """Write ``manifest.json`` with size and sha256 of every other file in ``folder``.

    ``known`` has those that the caller is sure of, which are not read again: weights take minutes at real size.
    """

    def entry(name: str, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        told = (known or {}).get(name)
        return told if told and told["bytes"] == size else {"bytes": size, "sha256": file_sha256(path)}

    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names.pop(MANIFEST_FILE, None)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        files = dict(zip(names, pool.map(entry, names.keys(), names.values()), strict=True))
    text = json.dumps(manifest.to_json() | {"files": files}, indent=2) + "\n"
    temporary = folder / f".{MANIFEST_FILE}.{uuid.uuid4().hex}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / MANIFEST_FILE)


def _broken_files(folder: Path, files: Files) -> list[str]:
    def problem(name: str, entry: dict[str, Any]) -> str | None:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, expected {entry['bytes']:,}"
        return None if file_sha256(path) == entry["sha256"] else f"{name} does not match its sha256"

    checked = {name: entry for name, entry in files.items() if not name.startswith(f"{ENGINES_FOLDER}/")}
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return [found for found in pool.map(problem, checked.keys(), checked.values()) if found]


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle after verifying every file's size and sha256 against the manifest.

    Engines are left to whoever opens one (engines/record.py): a damaged one does not keep the others from running, and
    nobody reads those of every GPU to use one.
    """
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
    needed = {CONFIG_FILE, *map(stage_file, manifest.stages)}
    broken = [f"{name} is not listed" for name in sorted(needed - files.keys())]
    if not weight_files(files):
        broken.append("no weights are listed")
    try:
        broken += _broken_files(folder, files)
    except (KeyError, TypeError) as error:
        raise D3tomError(f"{folder / MANIFEST_FILE} is incomplete ({error!r}). Rebuild the bundle.") from None
    if broken:
        raise D3tomError(
            f"Bundle {folder} is damaged: {listing(broken)}. Copy it again from where it was built, or rebuild it."
        )
    config = ModelConfig.from_json(read_json(folder / "config.json"), manifest.vocab_rows, str(folder / "config.json"))
    manifest.merge.check_layer(config.language.n_layers)
    return Bundle(folder, manifest, config)


def _is_our_bundle(folder: Path) -> bool:
    """Whether every file in ``folder`` is one that a manifest of ours lists: only then may it be replaced."""
    if folder.is_symlink() or not (folder / MANIFEST_FILE).is_file():
        return False
    try:
        raw = read_json(folder / MANIFEST_FILE)
    except D3tomError:
        return False
    created_by, listed = raw.get("created_by"), raw.get("files")
    if not isinstance(created_by, dict) or "d3tom_export" not in created_by or not isinstance(listed, dict):
        return False
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return found <= {*listed, MANIFEST_FILE}


def check_output_folder(output: Path, force: bool) -> None:
    """Refuse an output folder that exists, unless ``force`` may replace it because it is a bundle and nothing else."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise D3tomError(f"Output folder {output} exists. Give another with --output, or --force to replace it.")
    if not _is_our_bundle(output):
        raise D3tomError(
            f"Output folder {output} exists and is not a bundle (or holds files that no build wrote), so --force does "
            "not replace it. Give another folder with --output, or remove it yourself."
        )


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling to fill; it becomes ``output`` when the block ends well, and vanishes otherwise.

    So do parent folders that had to be made for it.
    """
    check_output_folder(output, force)
    missing = [parent for parent in output.parents if not parent.exists()]
    temporary = output.parent / f".{output.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise D3tomError(f"Output folder {output} cannot be written: {error}. Give another with --output.") from None
    done = False
    try:
        yield temporary
        check_output_folder(output, force)  # it may have appeared meanwhile
        _swap(temporary, output)
        done = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def abandoned_folders(output: Path) -> list[Path]:
    """What builds of ``output`` left behind that were killed outright: no process of their number runs here.

    They are not removed: where a file system is shared, they may be another machine's at work.
    """

    def runs(number: str) -> bool:
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
        except (OSError, ValueError):
            pass
        return True

    prefix = f".{output.name}.partial-"
    found = sorted(output.parent.glob(f"{glob.escape(prefix)}*")) if output.parent.is_dir() else []
    return [path for path in found if not runs(path.name.removeprefix(prefix).partition("-")[0])]


def _swap(temporary: Path, output: Path) -> None:
    """Rename ``temporary`` to ``output``, whose former content is removed last and comes back if the rename fails."""
    if not output.exists():
        temporary.rename(output)
        return
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    output.rename(replaced)
    try:
        temporary.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced)
