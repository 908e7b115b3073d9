"""What faults are put into: made anew for a run by hand, or of folders that the test session has."""

from __future__ import annotations

from pathlib import Path

from d3tom_export.bundle.folder import load_bundle
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
from d3tom_export.config import LOOPS, GenerationConfig, MergeConfig
from d3tom_export.export.assemble import write_stages
from d3tom_export.export.request import StageRequest
from tests.conftest import TINY_MERGE, raw_config, write_checkpoint, write_int8
from tests.mutation.fault import Subjects

SMALL_MERGE = MergeConfig(layer=1, ratio=0.7)


def made_in(folder: Path) -> Subjects:
    """Checkpoint and bundles written under ``folder``, that of the bundled model when it is first asked for."""
    checkpoint = write_checkpoint(folder / "synthetic", raw_config())
    small, plain, bundled = folder / "small", folder / "plain", folder / "bundled"
    small.mkdir()
    write_stages(open_checkpoint(checkpoint), StageRequest(SMALL_MERGE, LOOPS), GenerationConfig(gen_length=8), small)

    def make_bundled() -> Path:
        plain.mkdir()
        model = open_checkpoint(bundled_model())
        write_stages(model, StageRequest(TINY_MERGE, LOOPS), default_generation(model.config, model.folder), plain)
        write_int8(load_bundle(plain), bundled)
        return bundled

    return Subjects(checkpoint, small, make_bundled)
