"""A bundle: everything one merged model needs to run, in a folder with a manifest. Imports no framework.

The folder is a checkpoint too (``config.json``, safetensors in one file or in shards, ``tokenizer.json``): the graphs'
external data are the tensors of its safetensors files, each stored once under its released name and in its own dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d3tom_export.bundle.half import HALF_DTYPES, HALF_PRECISIONS, half_file
from d3tom_export.bundle.manifest import (
    AGAIN,
    ENGINES_FOLDER,
    MANIFEST_FILE,
    READ_FILES,
    Files,
    Manifest,
    check_schema,
    check_stages,
    check_token_ids,
    checked_files,
    stage_file,
    weight_files,
)
from d3tom_export.checkpoint.stored import INDEX_FILE, read_array
from d3tom_export.checkpoint.tensors import EMBEDDING_TABLE, model_tensors
from d3tom_export.config import CONFIG_FILE, Loop, ModelConfig
from d3tom_export.cpu.place import CPU_PRECISIONS, tuned_file, with_library
from d3tom_export.errors import D3tomError, listing
from d3tom_export.families.registry import read_config
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.files import check_name, find_inside, is_there, open_file, read_bytes
from d3tom_export.trust.graphs import MOST_BYTES, Graph, read_graph, relocated
from d3tom_export.trust.known_hashes import KnownHashes, file_sha256_of
from d3tom_export.trust.tensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Verify = Literal["auto", "full"]
"""Which files of a bundle are hashed when it is opened: those that are read and that this machine does not know as they
are, or every one."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were verified (:func:`load_bundle`)."""

    folder: Path
    manifest: Manifest
    config: ModelConfig
    files: Files | None = None
    """What the manifest lists. None: this process has just written the folder itself."""
    hashes: KnownHashes | None = field(default=None, compare=False, repr=False)
    """What is known of its files' hashes, for those that are verified later: engines, and weights left out."""
    weights_verified: bool = field(default=True, compare=False, repr=False)
    """Whether the weight files were verified too; else each is before it is read."""

    def file(self, name: str) -> Path | None:
        """The file ``name`` of the bundle; None where it has none of that name. Only listed files count.

        Raises :class:`D3tomError` where one lies there that the manifest does not list.
        """
        if self.files is None or name in self.files:
            return find_inside(self.folder, name) if self.files or is_there(self.folder, name) else None
        if is_there(self.folder, name):
            raise D3tomError(_unlisted(self.folder, [name]))
        return None

    def read(self, name: str, limit: int) -> bytes:
        """All of a listed file, of at most ``limit`` bytes, found to be what is listed."""
        content = read_bytes(find_inside(self.folder, name), limit)
        if self.files is not None:
            listed = self.files.get(name)
            if listed is None:
                raise D3tomError(_unlisted(self.folder, [name]))
            if hashlib.sha256(content).hexdigest() != listed["sha256"]:
                raise D3tomError(_damaged(self.folder, [f"{name} does not match its sha256"]))
        return content

    @cached_property
    def _weights(self) -> dict[str, Path]:
        """The real paths of the weight files by their names in the bundle."""
        names = weight_files(self.files) if self.files is not None else None
        if names is None:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        return {name: find_inside(self.folder, name) for name in names}

    @cached_property
    def weights_folder(self) -> Path:
        """The folder that the graphs' external data (:meth:`graph`) lie in: the bundle's, or that of a hub's blobs."""
        return Path(os.path.commonpath([path.parent for path in self._weights.values()]))

    def graph(self, key: str, precision: str | None = None) -> bytes:
        """The graph of stage ``key``, read once, looked through and held against the manifest's stage.

        ``precision`` chooses the graph in half precision, or the one that was tuned for the CPU in it; None: the
        standard one. External data are named by where they lie in :attr:`weights_folder`. Raises :class:`D3tomError`
        where the graph holds what no stage of ours does (:mod:`d3tom_export.trust.graphs`), other tensors, or weights
        in other than listed files.
        """
        if precision in HALF_PRECISIONS:
            return self._open_graph(half_file(precision, key), key, precision)
        return self._open_graph(stage_file(key) if precision is None else tuned_file(precision, key), key)

    def engine_graph(self, name: str) -> bytes:
        """As :meth:`graph`, of a graph that engines are built from, whose tensors may be of other dtypes."""
        return self._open_graph(name, None)

    def _open_graph(self, name: str, key: str | None, precision: str | None = None) -> bytes:
        content = self.read(name, MOST_BYTES)
        try:
            graph = read_graph(content)
            self._check_weights(graph)
            if key is not None:
                self._check_contract(graph, key, precision or self.manifest.precision)
        except ValueError as error:
            raise D3tomError(
                f"The graph {self.folder / name} is refused: {error}. A build of ours writes no such graph: fetch the "
                "bundle again from where it was built, or rebuild it."
            ) from None
        moved = {
            file: real
            for file, path in self._weights.items()
            if (real := path.relative_to(self.weights_folder).as_posix()) != file
        }
        return relocated(content, moved) if moved else content

    def _check_contract(self, graph: Graph, key: str, precision: str) -> None:
        spec, names = self.manifest.stages[key], set(self.manifest.stage_weights[key])
        half = HALF_DTYPES.get(precision)
        for what, tensors, found in (("inputs", spec.inputs, graph.inputs), ("outputs", spec.outputs, graph.outputs)):
            if len(found) != len(tensors):
                raise ValueError(
                    f"its {what} are not those of stage {key}: it has {len(found)}, expected {len(tensors)}"
                )
            for mine, tensor in zip(found, tensors, strict=True):
                made = (tensor.name, tensor.dtype, tensor.axes)
                in_half = (tensor.name, half if tensor.dtype == "float32" else None, tensor.axes)
                if mine not in (made, in_half):
                    raise ValueError(
                        f"its {what} are not those of stage {key}: it has {_shown(mine)} for {_shown(made)}"
                    )
        foreign = sorted({weight.name for weight in graph.weights} - names)
        if foreign:
            raise ValueError(f"it has weights that are none of stage {key}: {listing(foreign)}")
        rows, table = self.manifest.vocab_rows, [each for each in graph.weights if each.name == EMBEDDING_TABLE]
        if any(weight.shape[:1] != (rows,) for weight in table):
            raise ValueError(f"its embedding table has the shape {table[0].shape}, and the manifest has {rows} tokens")

    def _check_weights(self, graph: Graph) -> None:
        for weight in graph.weights:
            file = self._weights.get(weight.file)
            if file is None:
                raise ValueError(f"its weight {weight.name!r} lies in {weight.file!r}, which is no listed weight file")
            size = file.stat().st_size
            if weight.offset + weight.length > size:
                raise ValueError(f"its weight {weight.name!r} ends beyond the {size:,} bytes of {weight.file}")

    def check_graphs(self) -> None:
        """Look through every graph (:meth:`graph`), for readers that open them by their paths."""
        for key in self.manifest.stages:
            for precision in (None, *CPU_PRECISIONS, *map(with_library, CPU_PRECISIONS)):
                if precision is None or self.has_tuned(key, precision):
                    self.graph(key, precision)
            for half in HALF_PRECISIONS:
                if self.has_half(key, half):
                    self.graph(key, half)

    def has_tuned(self, key: str, precision: str) -> bool:
        """Whether stage ``key`` has a graph for the CPU in ``precision``: others an interrupted command left there."""
        return self._has(tuned_file(precision, key))

    def has_half(self, key: str, precision: str) -> bool:
        """Whether stage ``key`` has a graph in half ``precision``: others an interrupted command left there."""
        return self._has(half_file(precision, key))

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file() if self.files is None else name in self.files

    def stage_keys(self, loop: Loop) -> dict[str, str]:
        """The keys of one loop's stages by stage name, those that both loops share among them."""
        return {spec.name: key for key, spec in self.manifest.stages.items() if spec.loop in (None, loop)}

    def stages(self, loop: Loop) -> dict[str, Path]:
        """The graphs of one loop by stage name, for readers that open them by path (:meth:`check_graphs`)."""
        return {name: self.folder / stage_file(key) for name, key in self.stage_keys(loop).items()}

    def image_newline(self) -> NDArray[np.float32]:
        """(D,) the vector that closes every row of a picture's tokens, read from the weights."""
        tensor = model_tensors(self.folder, self.config).get("model.image_newline")
        width = self.config.language.d_model
        if (
            not isinstance(tensor, StoredTensor)
            or tensor.shape != (width,)
            or tensor.dtype not in ("F64", "F32", "F16", "BF16")
        ):
            found = "has none" if tensor is None else f"has one of {tensor.dtype} and shape {list(tensor.shape)}"
            raise D3tomError(
                f"{self.folder} {found} of the weights that its pictures need, model.image_newline: expected {width} "
                "floating-point numbers. Fetch the bundle again from where it was built, or rebuild it."
            )
        self._check_weight_file(tensor.source)
        return read_array(tensor)

    def _check_weight_file(self, source: Path) -> None:
        """Verify the weight file that lies at ``source``, unless that was done when the bundle was opened."""
        if self.weights_verified or self.files is None or self.hashes is None:
            return
        files = {name: self.files[name] for name, real in self._weights.items() if real == source}
        _check_files(self.folder, self.manifest, files, self.hashes)

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


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a regular file, read in pieces."""
    with open_file(path) as file:
        return file_sha256_of(file)


def listed_files(folder: Path) -> Files:
    """The files that the manifest in ``folder`` lists: their names are plain ones, their entries of the right kinds."""
    path = find_inside(folder, MANIFEST_FILE)
    return checked_files(path, read_json(path).get("files"))


def write_manifest(folder: Path, manifest: Manifest, known: Files | None = None) -> Files:
    """Write ``manifest.json`` with size and sha256 of every other file in ``folder``, which are returned.

    ``known`` has those that the caller is sure of, which are not read again: weights take minutes at real size. What is
    hashed here need not be once more when the bundle is opened on this machine.
    """
    hashes = KnownHashes(folder, anew=True)

    def entry(name: str, path: Path) -> dict[str, Any]:
        told = (known or {}).get(name)
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            return told if told and told["bytes"] == size else {"bytes": size, "sha256": hashes.hash_file(name, file)}

    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names.pop(MANIFEST_FILE, None)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        files = dict(zip(names, pool.map(entry, names.keys(), names.values()), strict=True))
    text = json.dumps(manifest.to_json() | {"files": files}, indent=2) + "\n"
    temporary = folder / f".{MANIFEST_FILE}.{uuid.uuid4().hex}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / MANIFEST_FILE)
    hashes.save()
    return files


def _shown(tensor: tuple[str, str, tuple[str | int, ...]]) -> str:
    name, dtype, axes = tensor
    return f"{name} {dtype} ({', '.join(map(str, axes))})"


def _unlisted(folder: Path, names: list[str]) -> str:
    return (
        f"{folder} holds {listing(names)}, which its {MANIFEST_FILE} does not list and which would be read. Remove "
        f"what does not belong to the bundle. {AGAIN}"
    )


def _damaged(folder: Path, problems: list[str], remedy: str = AGAIN) -> str:
    return f"Bundle {folder} is damaged: {listing(problems)}. {remedy}"


def _check_files(folder: Path, manifest: Manifest, files: Files, hashes: KnownHashes) -> None:
    """Hold ``files`` of the folder against their sizes and hashes. Raises :class:`D3tomError` that says what to do."""

    def problem(name: str, entry: dict[str, Any]) -> str | None:
        if not is_there(folder, name):
            return f"{name} is missing"
        with open_file(find_inside(folder, name)) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes, expected {entry['bytes']:,}"
            return None if hashes.is_sha256(name, file, entry["sha256"]) else f"{name} does not match its sha256"

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = zip(files, pool.map(problem, files.keys(), files.values()), strict=True)
        broken = {name: text for name, text in found if text}
    hashes.save()
    if broken:
        raise D3tomError(_damaged(folder, list(broken.values()), _remedy(folder, manifest, broken)))


def _remedy(folder: Path, manifest: Manifest, broken: dict[str, str]) -> str:
    """What to do about broken files: linked weights that changed in place are the checkpoint's own."""
    changed = [name for name in weight_files({name: {} for name in broken}) if is_there(folder, name)]
    if manifest.linked_weights and any((folder / name).stat().st_nlink > 1 for name in changed):
        return (
            f"The weights in it are hard links to the checkpoint's own files, and {listing(changed)} changed there "
            "since the bundle was built. Rebuild it; with `--weights copy` it has weights of its own, which no change "
            "of the checkpoint reaches."
        )
    return "Copy it again from where it was built, or rebuild it."


def _check_listed(folder: Path, manifest: Manifest, files: Files) -> None:
    """Refuse a list that lacks a file which is needed, or one that lies there and would be read."""
    needed = {CONFIG_FILE, *map(stage_file, manifest.stages)}
    broken = [f"{name} is not listed" for name in sorted(needed - files.keys())]
    if not weight_files(files):
        broken.append("no weights are listed")
    if broken:
        raise D3tomError(_damaged(folder, broken))
    read = set(READ_FILES)
    if INDEX_FILE in files:
        path = find_inside(folder, INDEX_FILE)
        shards = read_json(path).get("weight_map")
        named = list(shards.values()) if isinstance(shards, dict) else [shards]
        for name in set(named) if all(isinstance(name, str) for name in named) else named:
            try:
                read.add(check_name(name, suffix=".safetensors"))
            except D3tomError as error:
                raise D3tomError(f"{path} names a shard: {error} {AGAIN}") from None
    unlisted = sorted(name for name in read - files.keys() if is_there(folder, name))
    if unlisted:
        raise D3tomError(_unlisted(folder, unlisted))


def load_bundle(folder: Path, verify: Verify = "auto", *, reads_weights: bool = True) -> Bundle:
    """Open a bundle after verifying its files' sizes and sha256 against the manifest.

    Args:
        folder: The bundle's.
        verify: "auto" hashes the files that this machine has not yet hashed as they are
            (:mod:`d3tom_export.trust.known_hashes`), "full" all of them.
        reads_weights: Whether weights are going to be read. Where not, as with engines, "auto" leaves their files to
            whoever reads one after all (:meth:`Bundle.image_newline`).

    Whoever wrote it may be a stranger: names are plain ones inside the folder, kinds and ranges those of a manifest,
    stages those of the model. Graphs are looked through when they are opened (:meth:`Bundle.graph`). Engines are left
    to whoever opens one (engines/record.py): a damaged one does not keep the others from running, and nobody reads
    those of every GPU to use one.
    """
    if not is_there(folder, MANIFEST_FILE):
        raise D3tomError(
            f"{folder} is not a bundle: it has no {MANIFEST_FILE}. Give the folder that `d3tom-export build` wrote."
        )
    raw = read_json(find_inside(folder, MANIFEST_FILE))
    path = folder / MANIFEST_FILE
    check_schema(path, raw)
    files = checked_files(path, raw["files"])
    try:
        manifest = Manifest.from_json(raw)
    except D3tomError as error:
        raise D3tomError(f"{path}: {error}") from None
    _check_listed(folder, manifest, files)
    hashes = KnownHashes(folder, anew=verify == "full")
    left_out = set() if reads_weights or verify == "full" else set(weight_files(files))
    verified = {
        name: entry
        for name, entry in files.items()
        if name not in left_out and not name.startswith(f"{ENGINES_FOLDER}/")
    }
    _check_files(folder, manifest, verified, hashes)
    config_file = folder / CONFIG_FILE
    config = read_config(read_json(find_inside(folder, CONFIG_FILE)), manifest.vocab_rows, str(config_file))
    manifest.merge.check_layer(config.language.n_layers)
    check_token_ids(path, manifest.generation, manifest.vocab_rows)
    check_stages(path, raw, manifest, config)
    return Bundle(folder, manifest, config, files, hashes, not left_out)
