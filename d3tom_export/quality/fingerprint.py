"""What a model is, by the contents of its files: answers of one belong to no other. Imports no framework."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import ENGINES_FOLDER, stage_file, weight_files
from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.config import CONFIG_FILE, TOKENIZER_FILE
from d3tom_export.progress import Progress, no_progress
from d3tom_export.prompt.settings import PromptSettings
from d3tom_export.trust.files import find_inside, open_file
from d3tom_export.trust.known_hashes import KnownHashes

_SHORT = 12
"""Characters of a hash that tell one build from others."""
_OTHER_TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


def _digest(entries: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def bundle_fingerprint(bundle: Bundle) -> str:
    """Of a verified bundle's weights, config, tokenizer and stages, not of engines and graphs that were added later."""
    files = bundle.files or {}
    named = {CONFIG_FILE, TOKENIZER_FILE, *weight_files(files), *map(stage_file, bundle.manifest.stages)}
    return _digest((name, str(files[name]["sha256"])) for name in named & files.keys())


def built_fingerprint(bundle: Bundle, backend: str, precision: str) -> str:
    """Of graphs or engines that were added to a bundle, as far as this backend reads them in this precision.

    A dot and a short hash, to be put behind the precision's name; "" where only the bundle's own stages are read.
    """
    if backend.startswith("tensorrt"):
        read = re.compile(rf"{ENGINES_FOLDER}/{re.escape(backend)}-sm[^/]*-{re.escape(precision)}/[^/]+\.plan")
    elif backend.startswith("onnxruntime") and precision != bundle.manifest.precision:
        read = re.compile(rf"(half|cpu)/{re.escape(precision)}/[^/]+\.onnx")
    else:
        return ""
    found = [(name, str(entry["sha256"])) for name, entry in (bundle.files or {}).items() if read.fullmatch(name)]
    return f".{_digest(found)[:_SHORT]}" if found else ""


def checkpoint_fingerprint(checkpoint: Checkpoint, progress: Progress = no_progress) -> str:
    """Of a checkpoint's weights, config and tokenizer, and of a tower of another folder.

    A file that this machine has hashed before is not read again (:mod:`d3tom_export.trust.known_hashes`).
    """
    folders = [checkpoint.folder, *([checkpoint.tower_folder] if checkpoint.tower_folder else [])]
    files = [(folder, name) for folder in folders for name in _names(folder)]
    entries = []
    for done, (folder, name) in enumerate(files):
        progress("hashing the model", done, len(files))
        hashes = KnownHashes(folder)
        with open_file(find_inside(folder, name)) as file:
            entries.append((name, hashes.sha256_of(name, file)))
        hashes.save()
    progress("model hashed", len(files), len(files))
    return _digest(entries)


def _names(folder: Path) -> list[str]:
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    return [
        *weights,
        *(name for name in (CONFIG_FILE, TOKENIZER_FILE, *_OTHER_TOKENIZER_FILES) if (folder / name).is_file()),
    ]


def wording_fingerprint(prompt: PromptSettings) -> str:
    """Of how a model is asked."""
    return fingerprint_of(prompt.to_json())


def fingerprint_of(document: Any) -> str:
    """Of what is made of JSON's types."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
