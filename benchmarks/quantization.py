"""What weights in few bits cost in quality: every format beside the unquantized model, in eager PyTorch.

    python -m benchmarks.quantization [--model DIR] [--samples N] [--calibration N] [--only NAME]... [--figure FILE]
        [--json FILE]

No graph is exported: a bundle's graphs answer as PyTorch does with the numbers that their codes stand for, which
`validate` proves. The samples that scales and roundings are fitted to are others than those that are answered.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import Checkpoint, default_generation, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.tensors import product_shapes
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.cost.bench import share_interval
from d3tom_export.cost.figure import need_matplotlib, save
from d3tom_export.export.calibrate import calibration_of
from d3tom_export.export.quantized_weights import place_quantized
from d3tom_export.parity.loss import LossReport, measure_loss
from d3tom_export.pipeline import Reader
from d3tom_export.progress import no_progress
from d3tom_export.prompt.samples import Sample, TokenSample, samples_for
from d3tom_export.quantize.plan import QuantizeRequest, plan_of
from d3tom_export.quantize.summary import summary_of

MERGE = MergeConfig(layer=2, ratio=0.9)

Samples = Sequence[Sample | TokenSample]


def kinds(calibration: int) -> dict[str, QuantizeRequest]:
    """What is compared, by name."""
    return {
        "int4": QuantizeRequest("int4"),
        "int4, blocks of 32": QuantizeRequest("int4", 32),
        "int4, zero points": QuantizeRequest("int4", asymmetric=True),
        "int4, GPTQ": QuantizeRequest("int4", samples=calibration),
        "int4, zero points, GPTQ": QuantizeRequest("int4", samples=calibration, asymmetric=True),
        "int8": QuantizeRequest("int8"),
        "fp8": QuantizeRequest("fp8"),
        "fp8, GPTQ": QuantizeRequest("fp8", samples=calibration),
        "fp8, GPTQ, activations too": QuantizeRequest("fp8", samples=calibration, activations=True),
        "nvfp4": QuantizeRequest("nvfp4"),
        "nvfp4, GPTQ": QuantizeRequest("nvfp4", samples=calibration),
    }


def quantized(
    checkpoint: Checkpoint, folder: Path, request: QuantizeRequest, fitted: Samples, reader: Reader | None
) -> Checkpoint:
    """The checkpoint as ``request`` has it, in ``folder``."""
    folder.mkdir()
    for path in checkpoint.folder.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    generation = default_generation(checkpoint.config, checkpoint.folder)
    calibration = calibration_of(checkpoint, fitted, reader, generation, no_progress) if request.samples else None
    plan = plan_of(product_shapes(checkpoint.config, checkpoint.vision_layers), request)
    place_quantized(checkpoint, folder, plan, calibration=calibration)
    return open_checkpoint(folder, vocab_rows=checkpoint.config.language.vocab_rows)


def weight_error(checkpoint: Checkpoint, other: Checkpoint) -> float:
    """The norm of what all quantized weights are off by, relative to theirs."""
    off = of = 0.0
    for name in other.quantized:
        ((_, mine),), ((_, whole),) = (list(each.read([name])) for each in (other, checkpoint))
        off += (mine - whole.float()).square().sum().item()
        of += whole.float().square().sum().item()
    return (off / of) ** 0.5


def run(
    folder: Path,
    requests: Mapping[str, QuantizeRequest],
    samples: int,
    fit: int,
    scratch: Path,
    merge: MergeConfig = MERGE,
) -> Iterator[dict[str, Any]]:
    """One row a request, in order, as each is measured on ``samples``; the ``fit`` before them are to fit to."""
    checkpoint = open_checkpoint(folder)
    found = samples_for(folder, checkpoint.config, fit + samples)
    reader = Reader.from_folder(folder, checkpoint.config) if isinstance(found[0], Sample) else None
    generation: GenerationConfig = default_generation(checkpoint.config, folder)
    if reader is not None:
        generation = reader.with_ends(generation)
    whole = PyTorchBackend(load_model(checkpoint), merge)
    for number, (name, request) in enumerate(requests.items()):
        other = quantized(checkpoint, scratch / str(number), request, found[:fit], reader)
        summary, report = summary_of(other), LossReport(name, folder.name)
        assert summary is not None
        few = PyTorchBackend(load_model(other), merge)
        measure_loss(report, whole, few, checkpoint.config, reader, found[fit:], generation, merge)
        measured = {"kind": name, "bits": summary.bits, "weight_error": weight_error(checkpoint, other)}
        shutil.rmtree(scratch / str(number))
        yield measured | report.to_json()


HEAD = (
    "| weights | bits | weights off by | logits off by | tokens agree | answers the same | exact match |\n"
    f"{'| --- ' * 7}|"
)


def line(row: Mapping[str, Any]) -> str:
    """A row in Markdown."""
    exact = f"{row['right']} of {row['judged']} (unquantized {row['right_unquantized']})" if row["judged"] else "-"
    return (
        f"| {row['kind']} | {row['bits']:.2f} | {row['weight_error']:.2%} | {row['relative_logit_error']:.2%} | "
        f"{row['token_agreement']:.2%} | {row['same_answers']} of {row['samples']} | {exact} |"
    )


def draw(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of what the ``rows`` lose against their bits, in the format of the path's ending.

    Raises :class:`D3tomError` where matplotlib is missing or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.4, 4.4), dpi=110, layout="constrained")
    logits, exact = figure.subplots(1, 2, sharex=True)
    for number, row in enumerate(rows):
        # There are ten colours, and more rows.
        colour, marker = f"C{number % 10}", "os"[number // 10 % 2]
        logits.plot(row["bits"], row["relative_logit_error"], marker, color=colour)
        if row["judged"]:
            share = row["right"] / row["judged"]
            low, high = share_interval(row["right"], row["judged"])
            interval = [[share - low], [high - share]]
            exact.errorbar(row["bits"], share, interval, marker=marker, color=colour, linewidth=0.8)
        # Formats of as many bits lie below one another, so names stand in the legend.
        exact.plot([], [], marker, color=colour, label=row["kind"])
    if rows and rows[0]["judged"]:
        whole = rows[0]["right_unquantized"] / rows[0]["judged"]
        exact.axhline(whole, color="#999999", linewidth=1, label="unquantized")
    logits.set_ylabel("logits off by, at the median step")
    exact.set_ylabel("answers that are right, with 95 % intervals")
    for axes in (logits, exact):
        axes.set_xlabel("bits a weight")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.grid(visible=True, linewidth=0.3)
    logits.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle("Bytes of weights against quality", fontweight="bold")
    logits.set_title(title, fontsize=9, loc="left")
    save(figure, path)


@click.command()
@click.option("--model", "folder", type=click.Path(path_type=Path), help="Checkpoint.  [default: the bundled model]")
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Questions to answer.")
@click.option("--calibration", type=click.IntRange(min=1), default=16, show_default=True, help="Others to fit to.")
@click.option("--only", multiple=True, type=click.Choice(list(kinds(1))), help="Leave the others out.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw what is lost against the bits of a weight.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(
    folder: Path | None,
    samples: int,
    calibration: int,
    only: tuple[str, ...],
    figure: Path | None,
    json_file: Path | None,
) -> None:
    """Measure and print a Markdown table."""
    requests = {name: request for name, request in kinds(calibration).items() if not only or name in only}
    click.echo(HEAD)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for row in run(folder or bundled_model(), requests, samples, calibration, Path(scratch)):
            click.echo(line(row))
            rows.append(row)
    if figure is not None:
        draw(figure, f"{(folder or bundled_model()).name}, {samples} questions", rows)
    if json_file is not None:
        json_file.write_text(json.dumps({"samples": samples, "calibration": calibration, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
