"""What ``evaluate`` and ``tune`` run: a bundle on a backend, or a checkpoint in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig

from . import answer_options, common, options

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Bundle, Verify
    from d3tom_export.checkpoint.folder import Checkpoint
    from d3tom_export.loop.backend import Backend
    from d3tom_export.model.lavida import Lavida
    from d3tom_export.pipeline import Reader
    from d3tom_export.quality.results import Binding
    from d3tom_export.quality.settings import Refusal, Setting

RELEASED = MergeConfig(layer=3, ratio=0.8)
"""What a checkpoint is merged by unless told otherwise."""


@dataclass(frozen=True)
class Source:
    """A model to ask, before any weight is loaded."""

    name: str
    folder: Path
    """Of its files, its own samples among them."""
    reader: Reader
    merge: MergeConfig
    generation: GenerationConfig
    loops: tuple[Loop, ...]
    """That there are."""
    default_loops: tuple[Loop, ...]
    refusal: Refusal
    fingerprint: Callable[[], str]
    runtime: Callable[[Setting], Backend]
    """Loads what a setting needs when it is first asked for."""
    eager: bool
    own_generation: GenerationConfig
    """How it answers unless an option says otherwise."""
    checkpoint: tuple[Path | None, Path | None] | None
    """The folders to build of, as ``--model`` (None: the bundled model) and ``--vision-tower``: a bundle's is a
    checkpoint too. None: it is a bundle, whose graphs run."""
    bundled: bool
    """Whether it is a bundle, which may have been built with quirks of its own."""
    built: Callable[[Backend], str] = lambda _: ""
    """Of what a bundle's backend reads beside its stages (quality.fingerprint.built_fingerprint)."""

    def build_words(self) -> list[str]:
        """Options without which ``build`` makes another model of a bundle's folder than the bundle is."""
        from d3tom_export.checkpoint.folder import open_checkpoint

        if not self.bundled:
            return []
        rows = open_checkpoint(self.folder).config.language.vocab_rows
        words = [] if rows == self.reader.config.language.vocab_rows else ["--full-vocabulary"]
        return words + ([] if self.reader.prompt.drop_token_after_image else ["--keep-newline"])

    def asked(self, system: str | None, no_system: bool, stops: Sequence[str], early_exit: bool | None) -> Source:
        """With the wording of this run, and answers that end where their text is settled unless told otherwise."""
        reader = answer_options.reader_from(self.reader, system, no_system)
        generation = answer_options.generation_for(reader, self.generation, stops)
        return replace(self, reader=reader, generation=replace(generation, early_exit=early_exit is not False))

    def binding(self, data: str, backend: Backend) -> Binding:
        """What answers of ``backend`` to the questions ``data`` (their hash) are bound to."""
        from d3tom_export.quality.fingerprint import wording_fingerprint
        from d3tom_export.quality.results import Binding
        from d3tom_export.version import __version__

        wording = wording_fingerprint(self.reader.prompt)
        precision = backend.precision + self.built(backend)
        return Binding(self.fingerprint(), data, wording, backend.name, precision, __version__)


def open_source(
    bundle_folder: Path | None,
    model_folder: Path | None,
    vision_tower: Path | None,
    backend: str,
    device: Device,
    engine: dict[str, Any],
    verify: Verify,
    progress: common.ConsoleProgress,
) -> Source:
    """The bundle's or the checkpoint's; without either the bundled model's."""
    if bundle_folder is not None and model_folder is not None:
        raise click.UsageError("Give either a BUNDLE or --model DIR.")
    options.check_vision_tower(vision_tower, model_folder)
    if bundle_folder is not None:
        return _of_bundle(bundle_folder, backend, device, engine, verify, progress)
    if backend not in ("auto", "pytorch"):
        raise click.UsageError(f"--backend {backend} runs a BUNDLE; a checkpoint is run in eager PyTorch.")
    return _of_checkpoint(model_folder, vision_tower, progress)


def _of_bundle(
    folder: Path,
    backend: str,
    device: Device,
    engine: dict[str, Any],
    verify: Verify,
    progress: common.ConsoleProgress,
) -> Source:
    from d3tom_export.backends.select import open_backend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
    from d3tom_export.pipeline import Reader
    from d3tom_export.quality.fingerprint import built_fingerprint, bundle_fingerprint
    from d3tom_export.quality.settings import eager_refusal, graph_refusal

    bundle = load_bundle(folder, verify, reads_weights=backend not in options.ENGINE_BACKENDS)
    common.warn_of_random_weights(bundle)
    manifest, eager = bundle.manifest, backend == "pytorch"
    opened: dict[Loop, Backend] = {}

    def of_graphs(setting: Setting) -> Backend:
        if setting.loop not in opened:
            opened[setting.loop] = open_backend(
                backend, bundle, setting.loop, device=device, progress=progress, **engine
            )
        return opened[setting.loop]

    def checkpoint() -> Checkpoint:
        return open_checkpoint(bundle.folder, vocab_rows=manifest.vocab_rows)

    return Source(
        name=str(folder),
        folder=bundle.folder,
        reader=_reader(bundle, Reader),
        merge=manifest.merge,
        generation=manifest.generation,
        loops=LOOPS if eager else manifest.loops,
        default_loops=manifest.loops[:1],
        refusal=eager_refusal if eager else graph_refusal(manifest.merge),
        fingerprint=lambda: bundle_fingerprint(bundle),
        built=lambda backend: built_fingerprint(bundle, backend.name, backend.precision),
        runtime=_eager(checkpoint, progress) if eager else of_graphs,
        eager=eager,
        own_generation=default_generation(bundle.config, bundle.folder) if eager else manifest.generation,
        checkpoint=(bundle.folder, None) if eager else None,
        bundled=True,
    )


def _reader(bundle: Bundle, reader: type[Reader]) -> Reader:
    from d3tom_export.config import TOKENIZER_FILE
    from d3tom_export.errors import D3tomError

    if bundle.file(TOKENIZER_FILE) is None:
        raise D3tomError(f"{bundle.folder} has no tokenizer, so it cannot be asked anything. Build it of a checkpoint.")
    return reader.of_bundle(bundle)


def _of_checkpoint(model_folder: Path | None, vision_tower: Path | None, progress: common.ConsoleProgress) -> Source:
    from d3tom_export.bundled import bundled_model
    from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
    from d3tom_export.pipeline import Reader
    from d3tom_export.prompt.template import prompt_settings
    from d3tom_export.quality.fingerprint import checkpoint_fingerprint
    from d3tom_export.quality.settings import eager_refusal

    folder = bundled_model() if model_folder is None else model_folder
    checkpoint = open_checkpoint(folder, vision_tower=vision_tower)
    common.tell_notes(checkpoint)
    reader = Reader.from_folder(folder, checkpoint.config, prompt_settings(checkpoint, note=common.note))
    generation = reader.with_ends(default_generation(checkpoint.config, folder))
    return Source(
        name=folder.resolve().name if model_folder is None else str(folder),
        folder=folder,
        reader=reader,
        merge=RELEASED,
        generation=generation,
        loops=LOOPS,
        default_loops=LOOPS[:1],
        refusal=eager_refusal,
        fingerprint=lambda: checkpoint_fingerprint(checkpoint, progress),
        runtime=_eager(lambda: checkpoint, progress),
        eager=True,
        own_generation=generation,
        checkpoint=(model_folder, vision_tower),
        bundled=False,
    )


def _eager(checkpoint: Callable[[], Checkpoint], progress: common.ConsoleProgress) -> Callable[[Setting], Backend]:
    """The eager model for any setting, loaded once."""
    loaded: list[Lavida] = []

    def runtime(setting: Setting) -> Backend:
        from d3tom_export.backends.pytorch import PyTorchBackend

        if not loaded:
            loaded.append(_load(checkpoint(), progress))
        return PyTorchBackend(loaded[0], setting.effective, kv_cache=setting.loop == "cached")

    return runtime


def _load(checkpoint: Checkpoint, progress: common.ConsoleProgress) -> Lavida:
    """The eager model in float32; layer by layer from its files where memory does not hold it."""
    from d3tom_export.checkpoint.models import load_model
    from d3tom_export.export.preflight import GIB, free_memory
    from d3tom_export.export.weights import demand_of

    progress("loading the eager model", 0, 1)
    needed, free = demand_of(checkpoint, "link", LOOPS[:1]).eager, free_memory()
    streamed = free is not None and needed > free
    if streamed:
        common.note(
            f"The model takes {needed / GIB:.1f} GiB in float32 and {free / GIB:.1f} GiB are free: every layer is read "  # type: ignore[operator]
            "from its file whenever it runs, which is slow."
        )
    model = load_model(checkpoint, streamed=streamed)
    progress("eager model loaded", 1, 1)
    return model
