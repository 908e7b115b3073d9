"""Train lavida-tiny and write it as a LaViDa checkpoint folder. See README.md beside this file."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import click
import torch
from torch import nn

from d3tom_export.model.lavida import Lavida

from .attention import attend_in_steps
from .batches import Text
from .dense import DenseHead, DensePhase
from .initial import initialise_language, initialise_tower
from .language import Asker, HeldOut, LayoutPhase, LookupPhase, MergedPhase, PackedPhase, Pictures
from .layout import OrderHead
from .loop import LOG, Phase, Run, run_phase
from .release import model_config, write_checkpoint
from .tokenizer import train_tokenizer


class Heads(nn.Module):
    """Layers that only training needs."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.dense, self.order = DenseHead(d_model), OrderHead(d_model)


def fresh_model(text: Text, seed: int) -> tuple[Lavida, Heads]:
    """An untrained model and the heads that only training needs, from ``seed``."""
    torch.manual_seed(seed)
    model = Lavida(model_config(text.tokenizer))
    attend_in_steps(model)
    torch.manual_seed(seed)
    initialise_tower(model)
    torch.manual_seed(seed + 1)
    heads = Heads(model.config.language.d_model)
    torch.manual_seed(seed + 2)
    initialise_language(model)
    return model, heads


def _log_to(file: Path) -> None:
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(file, encoding="utf-8")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoint folder.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Training states, log.")
@click.option("--seed", default=11, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Parts of a step worked on at a time.")
@click.option("--dense-steps", default=2400, show_default=True, help="Phase 1: tower, labels for every token.")
@click.option("--lookup-steps", default=2400, show_default=True, help="Phase 2: half of the blocks, thinned pictures.")
@click.option("--packed-steps", default=1000, show_default=True, help="Phase 3: all blocks, whole pictures, merging.")
@click.option("--layout-steps", default=1200, show_default=True, help="Phase 4: descriptions, thinned pictures.")
@click.option("--merged-steps", default=2000, show_default=True, help="Phase 5: as phase 3, more gently.")
@click.option("--resume", is_flag=True, help="Go on from the states in --work.")
def main(
    out: Path,
    work: Path,
    seed: int,
    threads: int,
    dense_steps: int,
    lookup_steps: int,
    packed_steps: int,
    layout_steps: int,
    merged_steps: int,
    resume: bool,
) -> None:
    """Train lavida-tiny in five phases; its checkpoint is written whenever one of the last four is evaluated."""
    work.mkdir(parents=True, exist_ok=True)
    _log_to(work / "train.log")
    torch.set_num_threads(1)  # the parts of a step run side by side instead
    started = time.monotonic()
    LOG.info("examples.lavida_tiny.train %s", " ".join(sys.argv[1:]))
    text = Text(train_tokenizer())
    model, heads = fresh_model(text, seed)
    run = Run(model, heads, seed, work, threads)
    held_out = HeldOut(model, text)
    pictures = Pictures(Asker(model, text, held_out=False), model, seed)
    phases: list[Phase] = [
        DensePhase(model, heads.dense, dense_steps),
        LookupPhase(model, text, held_out, pictures, heads.order, lookup_steps),
        PackedPhase(model, text, held_out, pictures, heads.order, packed_steps),
        LayoutPhase(model, text, held_out, pictures, heads.order, layout_steps),
        MergedPhase(model, text, held_out, pictures, heads.order, merged_steps, learning_rate=2e-3),
    ]

    def publish(phase: Phase) -> None:
        if phase.number > 1:
            write_checkpoint(model, text.tokenizer, out)

    for phase in phases:
        run_phase(run, phase, resume, publish)
    LOG.info("done, %.0f s in this process", time.monotonic() - started)


if __name__ == "__main__":
    main()
