"""What quantizing lost, in figures: none for the same model, more in fewer bits, and never a verdict of parity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.tensors import released_shapes
from d3tom_export.cli.quantize_loss import unquantized_folder
from d3tom_export.config import LOOPS, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export.quantized_weights import place_quantized
from d3tom_export.parity.loss import LossReport, measure_loss
from d3tom_export.parity.source import find_source, note_source
from d3tom_export.parity.validate import OWN_WEIGHTS
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.prompt.samples import Sample
from d3tom_export.quantize.plan import QuantizeRequest, plan_of
from tests.conftest import BuildBundle, Invoke, picture

MERGE = MergeConfig(layer=1, ratio=0.7)
GENERATION = GenerationConfig(gen_length=8)


@pytest.fixture(scope="module")
def bundle(build_bundle: BuildBundle) -> Bundle:
    return build_bundle(MERGE, LOOPS, quantize=QuantizeRequest("int4"))


def quantized(checkpoint: Checkpoint, folder: Path, request: QuantizeRequest) -> PyTorchBackend:
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    place_quantized(checkpoint, folder, plan_of(released_shapes(checkpoint.config, checkpoint.vision_layers), request))
    return PyTorchBackend(load_model(open_checkpoint(folder, vocab_rows=checkpoint.config.language.vocab_rows)), MERGE)


def test_fewer_bits_lose_more(checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    reader = Reader.from_folder(checkpoint.folder, checkpoint.config)
    whole = PyTorchBackend(load_model(checkpoint), MERGE)
    sample = Sample("What is it?", picture(60, 40, 1))
    *_, last = run_loop(
        whole,
        embed_sample(whole, sample, reader, GENERATION),
        checkpoint.config.language.mask_token_id,
        GENERATION,
        MERGE,
    )
    right = Sample(sample.question, sample.picture, reader.answer(last, GENERATION).text)

    def lost(other: PyTorchBackend) -> LossReport:
        report = LossReport("other", "whole")
        measure_loss(report, whole, other, checkpoint.config, reader, [right], GENERATION, MERGE)
        return report

    none = lost(whole)
    assert (none.token_agreement, none.logit_error, none.kept_agreement) == (1.0, 0.0, 1.0)
    assert (none.same_answers, none.judged, none.right, none.right_unquantized) == (1, 1, 1, 1)
    assert none.steps == GENERATION.total_steps
    in_int8 = lost(quantized(checkpoint, tmp_path / "int8", QuantizeRequest("int8")))
    in_int4 = lost(quantized(checkpoint, tmp_path / "int4", QuantizeRequest("int4")))
    assert 0 < in_int8.logit_error < 0.5 * in_int4.logit_error
    assert in_int8.token_agreement >= in_int4.token_agreement
    assert in_int4.right_unquantized == 1
    assert in_int4.right == in_int4.same_answers


def test_validate_tells_what_was_lost(bundle: Bundle, checkpoint_folder: Path, invoke: Invoke) -> None:
    asked = ("validate", bundle.folder, "--quantization-loss", "--samples", 2)
    told = invoke(*asked, "--model", checkpoint_folder, "--json", "-")
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["loops"] == list(LOOPS)
    assert report["samples"] == 4
    assert "int4" in report["quantized"]
    assert 0.01 < report["relative_logit_error"] < 0.5
    assert 0 < report["token_agreement"] <= 1
    by_note = invoke(*asked, "--json", "-")
    assert by_note.exit_code == 0, by_note.output
    assert json.loads(by_note.stdout) == report
    itself = invoke(*asked, "--model", bundle.folder)
    assert itself.exit_code == 1
    assert "are quantized too" in " ".join(itself.output.split())
    proving = invoke(*asked, "--model", checkpoint_folder, "--layers")
    assert proving.exit_code == 2
    assert "does not go with" in " ".join(proving.output.split())


def test_a_bundle_of_whole_weights_lost_nothing(
    build_bundle: BuildBundle, checkpoint_folder: Path, invoke: Invoke
) -> None:
    whole = build_bundle(MERGE, LOOPS)
    refused = invoke("validate", whole.folder, "--quantization-loss", "--model", checkpoint_folder)
    assert refused.exit_code == 1
    assert "No weight of" in refused.output


def test_what_it_was_made_of_is_never_the_oracle_of_a_proof(bundle: Bundle, checkpoint_folder: Path) -> None:
    assert bundle.manifest.source == note_source(checkpoint_folder)
    assert unquantized_folder(bundle, None).resolve() == checkpoint_folder.resolve()
    assert find_source(bundle, None).described == OWN_WEIGHTS
    unknown = replace(bundle, manifest=replace(bundle.manifest, source=None))
    with pytest.raises(D3tomError, match=r"is not known: its manifest notes no checkpoint\. Give the checkpoint"):
        unquantized_folder(unknown, None)


def test_evaluate_answers_with_the_quantized_weights(
    bundle: Bundle, checkpoint_folder: Path, questions: Path, invoke: Invoke, tmp_path: Path
) -> None:
    def answers(*asked: object) -> list[str]:
        results = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        told = invoke("evaluate", *asked, "--ratio", 0.7, "--data", questions, "--results", results)
        assert told.exit_code == 0, told.output
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        return [line["text"] for line in lines if "text" in line]

    on_graphs = answers(bundle.folder)
    eager = answers(bundle.folder, "--backend", "pytorch", "--layer", 1)
    whole = answers("--model", checkpoint_folder, "--layer", 1)
    assert on_graphs
    assert on_graphs == eager
    assert eager != whole
