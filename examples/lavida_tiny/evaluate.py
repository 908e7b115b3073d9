"""Exact match of a checkpoint folder on its own samples.zip, through the package's inference path.

Weights are read as stored (bf16) and computed in float32. Run as ``python -m examples.lavida_tiny.evaluate`` in the
repository root.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import click
import torch

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.prompt.samples import Sample, load_samples

from .batches import ANSWER_TOKENS


def exact_match(
    model: Lavida, reader: Reader, samples: list[Sample], merge: MergeConfig, kv_cache: bool
) -> dict[str, tuple[int, int]]:
    """(right, asked) over all questions ("all") and by kind: one token a step, most confident first."""
    backend = PyTorchBackend(model, merge, kv_cache=kv_cache)
    generation = GenerationConfig(gen_length=ANSWER_TOKENS)
    mask_token_id = model.config.language.mask_token_id
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        prompt = embed_sample(backend, sample, reader, generation)
        *_, last = run_loop(backend, prompt, mask_token_id, generation, merge)
        right = reader.answer(last, generation).text == sample.answer
        for kind in ("all", sample.kind):
            verdicts[kind].append(right)
    return {kind: (sum(values), len(values)) for kind, values in verdicts.items()}


@click.command()
@click.option("--model", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--samples", "count", type=int, help="Use the first so many samples only.")
@click.option("--ratio", "ratios", type=float, multiple=True, help="Also measure D3ToM at this ratio; may repeat.")
@click.option("--layer", default=2, show_default=True, help="Merge layer for --ratio.")
@click.option("--threads", default=2, show_default=True)
def main(folder: Path, count: int | None, ratios: tuple[float, ...], layer: int, threads: int) -> None:
    """Print exact match by kind of question: full attention and prefix cache, unmerged and merged."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    reader = Reader.from_folder(folder, checkpoint.config)
    samples = load_samples(folder / "samples.zip", count)
    merges = [("unmerged", MergeConfig(layer, 0.0, schedule="none"))]
    merges += [(f"D3ToM {ratio}", MergeConfig(layer, ratio)) for ratio in ratios]
    for label, merge in merges:
        for kv_cache in (False, True):
            started = time.monotonic()
            scores = exact_match(model, reader, samples, merge, kv_cache)
            shares = "  ".join(
                f"{kind} {right / asked:.1%} ({right}/{asked})" for kind, (right, asked) in scores.items()
            )
            name = "prefix" if kv_cache else "full"
            click.echo(f"{label}, {name} attention: {shares}  [{time.monotonic() - started:.0f} s]")


if __name__ == "__main__":
    main()
