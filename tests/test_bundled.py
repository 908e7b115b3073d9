"""Whatever a manifest calls its model, only the package's own folders are looked into."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3tom_export.bundled import DEFAULT_MODEL, bundled_model, is_bundled


def test_the_bundled_model_is_there() -> None:
    assert bundled_model().is_dir()
    assert is_bundled(bundled_model(DEFAULT_MODEL))


@pytest.mark.parametrize("name", ["..", "../models/lavida-tiny", "/etc", "", ".", "a/b", "a\0b", "x" * 5])
def test_other_names_lead_nowhere(name: str) -> None:
    folder = bundled_model(name)
    assert folder.parent == bundled_model().parent
    assert not Path(folder).exists()
