"""What only the eager model tells: whom the deciders attend to, how alike tokens are, and whether a backend is right.

The one module of this room that needs torch. V visual tokens, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.export.preflight import free_memory
from d3tom_export.export.weights import demand_of
from d3tom_export.loop.backend import Backend
from d3tom_export.parity.agreement import AgreementReport, compare_in_step
from d3tom_export.parity.source import check_same_config, find_source
from d3tom_export.parity.validate import Report, validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.progress import Progress
from d3tom_export.prompt.samples import Sample, TokenSample
from d3tom_export.report.watch import Watched

if TYPE_CHECKING:
    from d3tom_export.model.lavida import Lavida

Floats = NDArray[np.float32]


def has_torch() -> bool:
    """Whether the eager model can be run here."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


class Oracle:
    """The eager model that ``bundle`` is held against, in the precision of ``backend`` (int8 is held to float32).

    Its weights are read layer by layer where memory does not hold them. Raises :class:`D3tomError` where the checkpoint
    is another model's.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        merge: MergeConfig,
        model_folder: Path | None,
        vision_tower: Path | None,
        progress: Progress,
    ) -> None:
        source = find_source(bundle, model_folder)
        checkpoint = open_checkpoint(source.folder, vocab_rows=bundle.manifest.vocab_rows, vision_tower=vision_tower)
        check_same_config(bundle, checkpoint)
        progress("loading torch and the checkpoint", 0, 1)
        from d3tom_export.backends.pytorch import PRECISIONS, PyTorchBackend
        from d3tom_export.checkpoint.models import load_model

        half = backend.precision in ("fp16", "bf16")
        free, need = free_memory(), demand_of(checkpoint, "link", bundle.manifest.loops)
        model: Lavida = load_model(checkpoint, streamed=not half and free is not None and need.eager > free)
        if half:
            model = model.to(PRECISIONS[backend.precision])
        self.notice = source.notice
        """What users should know of where its weights are from; None where it is the checkpoint of the bundle."""
        # A page may be shown around: of a folder of the user's it has the name alone.
        self.compared_with = source.described.replace(str(source.folder), source.folder.name)
        self._backend, self._model = backend, model
        self._config, self._merge = bundle.config, merge
        self._rounds_inputs = bundle.manifest.rounds_inputs
        self._pytorch = PyTorchBackend(model, merge, kv_cache=backend.kv_cache)
        progress("torch and the checkpoint loaded", 1, 1)

    @property
    def tells_importance(self) -> bool:
        """Whether it is attention that scores the visual tokens, and not a policy of none."""
        return self._merge.select in ("decider", "fastv")

    def importance(self, watched: Watched) -> list[Floats | None]:
        """Of each step that was ``watched`` the (V,) scores of the visual tokens; None where nothing was scored."""
        session = self._pytorch.start(**watched.start)
        scores = [session.step(request).scores for request in watched.requests]
        return [None if each is None else each[0] for each in scores]

    def similarities(self, watched: Watched, steps: Sequence[int]) -> Floats:
        """(steps, N, V): how alike visual tokens are at these steps of what was ``watched``, counted from 0.

        Unmerged; with a KV cache the prompt runs alone, and there is one of it.
        """
        import torch

        from d3tom_export.merging.redundancy import nearest_similarities

        transformer = self._model.transformer
        dtype = transformer.wte.weight.dtype
        prompt = torch.from_numpy(watched.start["prompt_embeddings"]).to(dtype)[:1]
        positions = torch.from_numpy(watched.start["visual_positions"])
        sequences = [prompt]
        if not self._backend.kv_cache:
            ids = [torch.from_numpy(watched.requests[step].answer_ids)[:1] for step in steps]
            sequences = [torch.cat([prompt, self._model.embed_tokens(each).to(dtype)], dim=1) for each in ids]
        found = [nearest_similarities(transformer, sequence, positions).numpy() for sequence in sequences]
        return np.stack(found)

    def parity(
        self,
        reader: Reader | None,
        samples: Sequence[Sample | TokenSample],
        generation: GenerationConfig,
        progress: Progress,
    ) -> tuple[dict[str, Any], list[str]]:
        """The backend held against the eager model on ``samples``: as ``validate --json`` has it, and its lines."""
        exact = self._backend.precision == "fp32" and not self._rounds_inputs
        compare = validate_backends if exact else compare_in_step
        pairs = [(self._pytorch, self._backend)]
        whole = replace(generation, early_exit=False)
        report: Report | AgreementReport = compare(pairs, self._config, reader, samples, whole, self._merge, progress)
        report.compared_with = self.compared_with
        return report.to_json(), report.lines()
