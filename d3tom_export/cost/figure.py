"""What the pictures have in common: the files they are written to, and what to say where matplotlib is missing.

matplotlib draws them, from the optional extra ``plots``; it is imported only when a picture is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d3tom_export.errors import D3tomError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
"""What a picture's file name may end in."""


def need_matplotlib() -> None:
    """Raise :class:`D3tomError` where matplotlib cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise D3tomError(
            f"--figure draws with matplotlib, which is not installed here ({error}). Install it with `pip install "
            '"d3tom-export[plots]"`, or leave --figure out: the table and --json hold the same numbers.'
        ) from None


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``, whole or not at all. Raises :class:`D3tomError` where that cannot be."""
    import matplotlib

    partial = path.with_name(f".{path.name}.partial")
    try:
        # Without dates and random ids: the same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": "d3tom-export", "svg.fonttype": "none"}):
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(partial, format=path.suffix.lower().removeprefix("."), metadata=metadata)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise D3tomError(f"The picture cannot be written to {path}: {error}. Give --figure another path.") from None
