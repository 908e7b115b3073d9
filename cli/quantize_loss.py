"""What quantizing a bundle lost, for ``validate --quantization-loss``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from d3tom_export.errors import D3tomError

from .sections import Section, under

if TYPE_CHECKING:
    from d3tom_export.bundle.folder import Bundle
    from d3tom_export.checkpoint.folder import Checkpoint
    from d3tom_export.parity.loss import LossReport
    from d3tom_export.progress import Progress

    from .validate_subject import Subject

option = under(
    Section.CHECKS,
    click.option(
        "--quantization-loss",
        is_flag=True,
        help="Instead of parity, tell what quantizing lost: tokens, logits, kept sets and right answers of a bundle "
        "with weights in few bits beside PyTorch's with the weights that it was built from (--model).",
    ),
)


def unquantized_folder(bundle: Bundle, given: Path | None) -> Path:
    """The checkpoint that ``bundle``'s weights were quantized from: the one ``given``, or the one that it notes.

    Raises :class:`D3tomError` where the bundle's weights are whole, and where none is given or found.
    """
    from d3tom_export.parity.source import built_from

    if not bundle.manifest.formats:
        raise D3tomError(
            f"No weight of {bundle.folder} is in few bits, so that nothing was lost by it. Leave --quantization-loss "
            "out, or give a bundle that was built with --quantize."
        )
    if given is not None:
        return given
    found, reason = built_from(bundle)
    if found is None:
        raise D3tomError(
            f"What the weights of {bundle.folder} were quantized from is not known: {reason}. Give the checkpoint of "
            f"{bundle.manifest.model_name} with --model DIR."
        )
    return found.folder


def check_unquantized(checkpoint: Checkpoint) -> None:
    """Refuse to take a model for the unquantized one whose weights are in few bits themselves."""
    if checkpoint.quantized:
        raise D3tomError(
            f"The weights in {checkpoint.folder} are quantized too. Give what they were made of with --model."
        )


def rounded_by(folder: Path) -> int:
    """How many of the model's samples, its first ones, a bundle's weights were rounded by, as its config says."""
    from d3tom_export.config import CONFIG_FILE
    from d3tom_export.trust.documents import read_json
    from d3tom_export.trust.files import find_inside

    said = read_json(find_inside(folder, CONFIG_FILE)).get("quantization_config")
    count = said.get("samples") if isinstance(said, dict) else None
    return count if isinstance(count, int) and count > 0 else 0


def measure(subject: Subject, progress: Progress) -> LossReport:
    """The bundle of ``subject`` on its backend beside the model, which is unquantized, in each of its loops."""
    from d3tom_export.backends.pytorch import PyTorchBackend
    from d3tom_export.parity.loss import LossReport, measure_loss

    bundle, report = subject.bundle, None
    rest = (bundle.config, subject.reader, subject.samples, subject.generation, subject.merge, progress)
    for loop in subject.loops:
        backend = subject.open(loop, subject.graphs[0])
        if report is None:
            formats = ", ".join(sorted(bundle.manifest.formats))
            report = LossReport(f"{backend.name} ({backend.precision}, {formats})", subject.compared_with)
            report.fitted = min(rounded_by(bundle.folder), len(subject.samples))
        measure_loss(report, PyTorchBackend(subject.model, subject.merge, kv_cache=loop == "cached"), backend, *rest)
        del backend
    assert report is not None
    return report
