"""Engines of a bundle that shares: all of them but `extend`, which nobody asks of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.stages import StageProbes
from d3tom_export.pipeline import run_loop
from tests.backends.conftest import FP32
from tests.backends.fake_engines import Machine, own_bundle, write_engines
from tests.backends.test_tensorrt import ONE, PLAIN


def test_they_answer_unshared_questions_alone(
    sharing_bundle: Bundle, machine: Machine, eager_model: Lavida, tmp_path: Path
) -> None:
    own = own_bundle(sharing_bundle, tmp_path / "bundle")
    write_engines(own, FP32)
    backend = machine.backend(own, "cached", cuda_graphs=False)
    merge = MergeConfig(layer=1, ratio=0.7)
    assert list(run_loop(backend, ONE, 258, PLAIN, merge))
    with pytest.raises(D3tomError, match="Leave --share-prefix out, or run the bundle's graphs"):
        run_loop(backend, ONE, 258, PLAIN, merge, share_prefix=True)
    probes = StageProbes()
    probes.run(own, eager_model, backend, "cached")
    assert (probes.probed, probes.problems) == (["stages one by one [tensorrt, cached]"], [])
