"""Where the model that ships with the package lies."""

from __future__ import annotations

from pathlib import Path

DEFAULT_MODEL = "lavida-tiny"


def bundled_model(name: str = DEFAULT_MODEL) -> Path:
    """Checkpoint folder of a bundled model."""
    return Path(__file__).parent / "models" / name
