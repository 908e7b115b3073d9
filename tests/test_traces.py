"""The suite's own traces: a graph is taken again for the same stage, and for no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import hollow_model
from d3tom_export.config import LOOPS, CacheMergeConfig, MergeConfig
from d3tom_export.stages.contract import stage_specs
from d3tom_export.stages.cut import stage_modules
from tests.conftest import raw_config, write_checkpoint
from tests.traces import key

MERGE = MergeConfig(1, 0.7)


def _keys(checkpoint: Checkpoint, merge: MergeConfig = MERGE) -> dict[str, str]:
    model = hollow_model(checkpoint)
    places = {id(parameter): (name, checkpoint.tensors[name]) for name, parameter in model.named_parameters()}
    specs, modules = stage_specs(checkpoint.config, merge, 8, LOOPS), stage_modules(model, merge, LOOPS)
    return {name: key(specs[name], module, places) for name, module in modules.items()}


def test_the_same_stages_have_the_same_keys(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    keys = _keys(checkpoint)
    assert keys == _keys(checkpoint)
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    ("merge", "differ"),
    [
        (replace(MERGE, layer=2), {"front", "merge", "back", "decide", "cached_front", "cached_merge", "cached_back"}),
        (replace(MERGE, aggregate="mean"), {"merge"}),
        (replace(MERGE, select="fastv"), {"merge"}),
        (replace(MERGE, positions="original"), {"merge", "back"}),
        (replace(MERGE, cache=CacheMergeConfig(restore_norm=False)), {"cached_merge"}),
        (replace(MERGE, cache=CacheMergeConfig(text_targets=False)), {"cached_merge"}),
    ],
    ids=["layer", "mean", "fastv", "original", "norms", "text"],
)
def test_another_way_to_merge_has_keys_of_its_own(
    checkpoint_folder: Path, merge: MergeConfig, differ: set[str]
) -> None:
    """What a graph depends on, at least: a stage that is traced in vain costs seconds, one too few is another's."""
    checkpoint = open_checkpoint(checkpoint_folder)
    keys, others = _keys(checkpoint), _keys(checkpoint, merge)
    assert {name for name in keys if keys[name] != others[name]} >= differ


def test_other_sizes_and_places_have_keys_of_their_own(checkpoint_folder: Path, tmp_path: Path) -> None:
    keys = _keys(open_checkpoint(checkpoint_folder))
    for number, (changes, shards) in enumerate((({"rms_norm_eps": 1e-6}, 2), ({"rope_theta": 5e5}, 2), ({}, 1))):
        others = _keys(open_checkpoint(write_checkpoint(tmp_path / str(number), raw_config(**changes), shards)))
        differ = {name for name in keys if keys[name] != others[name]}
        assert differ >= {"front", "merge", "back", "decide", "cached_merge", "cached_back"}
