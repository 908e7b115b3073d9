"""A family that is defined in the documentation alone builds, is proven and answers (docs/families.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from d3tom_export.families.family import Family
from d3tom_export.families.registry import FAMILIES, read_config
from tests.conftest import Invoke, byte_tokenizer
from tests.families.checkpoints import write_family

_DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """The family of the page's code block, among the others for the time of a test."""
    (block,) = re.findall(r"```python\n(.*?)```", _DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr("d3tom_export.families.registry.FAMILIES", FAMILIES)
    before = dict(FAMILIES)
    names: dict[str, object] = {}
    exec(compile(block, str(_DOCUMENT), "exec"), names)
    assert FAMILIES.keys() - before.keys() == {"parrot"}
    family = names["PARROT"]
    assert isinstance(family, Family)
    yield family
    del FAMILIES["parrot"]


def _write(folder: Path) -> Path:
    """A checkpoint as parrots would publish it."""
    plain = write_family(folder / "plain", "llada", embedding_size=None, n_kv_heads=4)
    raw = json.loads((plain / "config.json").read_text())
    own = folder / "polly"
    own.mkdir()
    keys = {"width": "d_model", "depth": "n_layers", "heads": "n_heads", "inner": "mlp_hidden_size"}
    keys |= {"words": "vocab_size", "mask": "mask_token_id", "end": "eos_token_id", "theta": "rope_theta"}
    keys |= {"epsilon": "rms_norm_eps", "positions": "max_sequence_length"}
    config = {"model_type": "parrot", **{theirs: raw[ours] for theirs, ours in keys.items()}}
    (own / "config.json").write_text(json.dumps(config))
    state = load_file(plain / "model.safetensors")
    save_file({n.replace("model.transformer.", "bird."): t for n, t in state.items()}, own / "model.safetensors")
    byte_tokenizer().save(str(own / "tokenizer.json"))
    return own


def test_it_is_recognised_and_read(parrot: Family, tmp_path: Path) -> None:
    raw = json.loads((_write(tmp_path) / "config.json").read_text())
    config = read_config(raw)
    assert config.family == parrot.name
    assert (config.language.d_model, config.language.n_kv_heads, config.vision) == (32, 4, None)


@pytest.mark.slow
def test_it_builds_is_proven_and_answers(parrot: Family, tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "bundle"
    built = invoke("build", "--model", _write(tmp_path), "--layer", 1, "--ratio", 0.7, "--output", output)
    assert built.exit_code == 0, built.output
    assert "Self-check passed" in built.output
    answered = invoke("run", output, "--prompt", "Who is a pretty bird?", "--json", "-")
    assert answered.exit_code == 0, answered.output
    result = json.loads(answered.stdout)
    assert len(result["token_ids"]) == result["generation"]["gen_length"] == 12
    said = "Human: Who is a pretty bird?\nParrot: "
    assert result["prompt_tokens"] == len(byte_tokenizer().encode(said).ids)
