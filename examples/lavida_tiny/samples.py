"""Held-out scenes with questions: the bundled samples.zip and the sample pictures beside this file.

Run as ``python -m examples.lavida_tiny.samples`` in the repository root.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

from .digits import DigitBank
from .questions import KINDS, ask, can_ask
from .scenes import LONG_SIZES, NATIVE_SIZE, Scene, make_scene, random_size

_FIXED_TIME = (2025, 1, 1, 0, 0, 0)
"""Time stamp of every member, so that the same seed gives the same bytes."""

_PICTURES = (("digits.png", NATIVE_SIZE, 5), ("wide.png", LONG_SIZES[0], 3), ("tall.png", LONG_SIZES[1], 3))
"""Sample pictures: file, (width, height), things."""


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_samples(path: Path, count: int, seed: int) -> None:
    """``count`` held-out scenes, each with one question; kinds take turns, a quarter of the sizes are not 448x448."""
    rng = np.random.default_rng([seed, 0])
    bank = DigitBank.load(held_out=True)
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            scene = make_scene(rng, bank, random_size(rng))
            while not can_ask(scene, kind):
                scene = make_scene(rng, bank, random_size(rng))
            question = ask(rng, scene, kind)
            name = f"{number:04d}.png"
            archive.writestr(zipfile.ZipInfo(name, _FIXED_TIME), _png(scene))
            entry = {"image": name, "prompt": question.text, "answer": question.answer, "kind": question.kind}
            lines.append(json.dumps(entry) + "\n")
        index = zipfile.ZipInfo("samples.jsonl", _FIXED_TIME)
        index.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(index, "".join(lines))


def write_pictures(folder: Path, seed: int) -> None:
    """The sample pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 1])
    bank = DigitBank.load(held_out=True)
    for name, size, things in _PICTURES:
        scene = make_scene(rng, bank, size, things)
        (folder / name).write_bytes(_png(scene))
        click.echo(f"{name}: {ask(rng, scene, 'describe').answer}")


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoint folder.")
@click.option("--pictures", type=click.Path(file_okay=False, path_type=Path), help="Folder for the sample pictures.")
@click.option("--count", default=512, show_default=True)
@click.option("--seed", default=2511, show_default=True)
def main(out: Path, pictures: Path | None, count: int, seed: int) -> None:
    """Write samples.zip into --out and, if asked, a few pictures to play with."""
    out.mkdir(parents=True, exist_ok=True)
    write_samples(out / "samples.zip", count, seed)
    if pictures is not None:
        write_pictures(pictures, seed)


if __name__ == "__main__":
    main()
