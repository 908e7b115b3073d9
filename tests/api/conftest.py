"""Models that are open, once for all tests that ask them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import d3tom_export as d3
from d3tom_export.bundle.folder import Bundle


@pytest.fixture(scope="module", params=[False, True], ids=["uncached", "cached"])
def model(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[d3.Model]:
    """The synthetic checkpoint's bundle, in each of its loops."""
    with d3.open(bundle.folder, device="cpu", kv_cache=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Bundle) -> Iterator[d3.Model]:
    """The bundled model, without a cache."""
    with d3.open(tiny_bundle.folder, device="cpu", kv_cache=False) as opened:
        yield opened
