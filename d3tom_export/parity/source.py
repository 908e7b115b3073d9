"""Which checkpoint a bundle came from, so that it can be compared with that and not only with itself.

A bundle's own weights make an oracle that shares every fault of theirs. So a build notes the checkpoint's folder in the
manifest, under ``~`` where it lies in the home folder, for a published bundle tells no user's name; and a fingerprint
of its weight files' names, sizes and times. Only a folder that still has that fingerprint is opened: it is the
checkpoint as it was, and a manifest that a stranger wrote cannot name one of the user's folders, for nobody else knows
the times. Imports no framework.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import Manifest
from d3tom_export.bundled import bundled_model, weights_digest
from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.errors import D3tomError, listing, printable
from d3tom_export.parity.validate import OWN_WEIGHTS


class Source(NamedTuple):
    """The checkpoint that the oracle is read from."""

    folder: Path
    described: str
    """For the report: against what the bundle is compared."""
    notice: str | None = None
    """What to tell the user, where it is not the checkpoint that the bundle came from."""


def fingerprint(folder: Path) -> str:
    """sha256 over the names, sizes and times of a checkpoint folder's weight files and of its config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def note_source(folder: Path) -> dict[str, str]:
    """What the manifest says of the checkpoint in ``folder``."""
    resolved = folder.resolve()
    try:
        shown = f"~/{resolved.relative_to(Path.home().resolve()).as_posix()}"
    except (ValueError, RuntimeError):  # elsewhere, or no home
        shown = str(resolved)
    return {"folder": shown, "fingerprint": fingerprint(resolved)}


def _noted_folder(manifest: Manifest) -> tuple[Path | None, str]:
    """The folder that the manifest notes, if it is as it was; else None and why."""
    noted = manifest.source
    if noted is None:
        return None, "its manifest notes no checkpoint"
    shown = printable(noted["folder"], 200)
    try:
        folder = Path(noted["folder"]).expanduser()
        if not folder.is_absolute() or not folder.is_dir():
            return None, f"the checkpoint {shown} is not here"
        if fingerprint(folder) != noted["fingerprint"]:
            return None, f"the checkpoint {shown} is not as it was at the build"
    except (OSError, RuntimeError, ValueError):
        return None, f"the checkpoint {shown} cannot be read"
    return folder, ""


def built_from(bundle: Bundle) -> tuple[Source | None, str]:
    """The checkpoint that ``bundle`` was built from, if it is here and as it was; else None and why not."""
    manifest = bundle.manifest
    # Only the very weights the bundle was built from will do: a folder's name says nothing.
    named = bundled_model(manifest.model_name)
    if named.is_dir() and manifest.bundled_digest == weights_digest(named):
        return Source(named, f"the packaged model {manifest.model_name}"), ""
    folder, reason = _noted_folder(manifest)
    if folder is None:
        return None, reason
    return Source(folder, f"the checkpoint {folder}, which the bundle was built from"), ""


def find_source(bundle: Bundle, given: Path | None) -> Source:
    """The checkpoint to compare ``bundle`` with: the one ``given``, else the one it came from, else its own weights.

    A bundle with weights in few bits is its own: they were made of the checkpoint's, and are others.
    """
    if given is not None:
        if given.resolve() == bundle.folder.resolve():
            return Source(given, OWN_WEIGHTS)
        return Source(given, f"the checkpoint {given}")
    if bundle.manifest.formats:
        return Source(bundle.folder, OWN_WEIGHTS, "Oracle: the bundle's own weights, which are in few bits.")
    found, reason = built_from(bundle)
    return found or Source(
        bundle.folder,
        OWN_WEIGHTS,
        f"Oracle: the bundle's own weights ({reason}); --model DIR compares with {bundle.manifest.model_name}.",
    )


def check_same_config(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse to compare ``bundle`` with a checkpoint of another configuration: one of the two was changed.

    That is what their ``config.json`` say of the same thing, picture sizes and the mask token among them.
    """
    if checkpoint.config == bundle.config:
        return
    ours, theirs = _flat(asdict(bundle.config)), _flat(asdict(checkpoint.config))
    differing = [
        f"{name} is {printable(str(ours.get(name)), 80)} in the bundle and {printable(str(theirs.get(name)), 80)} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    raise D3tomError(
        f"{checkpoint.folder} is another model than the one {bundle.folder} was built from "
        f"({bundle.manifest.model_name}), or the bundle was changed since: their configurations differ "
        f"({listing(differing)}). Give the bundle's own checkpoint with --model, or build the bundle again."
    )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested dictionaries under one name each."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
