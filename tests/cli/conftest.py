"""What several commands are asked with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import picture


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture in a file."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    picture(70, 50).save(path)
    return path
