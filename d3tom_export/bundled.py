"""Where the model that ships with the package lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

DEFAULT_MODEL = "lavida-tiny"


def bundled_model(name: str = DEFAULT_MODEL) -> Path:
    """Checkpoint folder of a bundled model; it does not exist where none has this name.

    A manifest's word may be asked for: what is no plain name leads nowhere else either.
    """
    return Path(__file__).parent / "models" / (name if name.replace("-", "").isalnum() else "none")


def is_bundled(folder: Path) -> bool:
    """Whether ``folder`` is one of the package's own models."""
    return folder.resolve().parent == bundled_model().resolve().parent


def weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of a checkpoint folder's weight files (a bundled model's are small)."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
