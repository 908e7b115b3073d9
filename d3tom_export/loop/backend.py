"""What a runtime offers to the denoising loop, and to those who look at its stages one by one.

P prompt tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, Session


class Backend(Protocol):
    """What a runtime offers: the two embedding stages, and sessions for the denoising loop."""

    name: str
    kv_cache: bool
    """Whether its sessions keep the prompt's keys and values."""
    precision: str
    """"fp32", "fp16" or "bf16": what it computes in. It picks how it is compared, and with what tolerance."""
    shares_prefix: bool
    """Whether :meth:`start` takes ``shared_rows``."""

    def embed_tokens(self, token_ids: Ints) -> Floats:
        """(B, S) int64 -> (B, S, D) float32."""

    def encode_views(self, pixel_values: Floats) -> Floats:
        """(views, 3, S, S) float32 -> (views, T, D) float32."""

    @property
    def image_newline(self) -> NDArray[np.float32]:
        """(D,) the vector that closes every row of a picture's tokens."""

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> Session:
        """Begin an answer: (B, P, D) float32 and (V,) ascending int64.

        ``merges`` tells whether any step may merge anew. With ``prompt_merge``, for a loop with a KV cache alone, the
        prompt is merged now and no step does. Of the prompt's rows the first ``shared_rows``, all visual ones among
        them, are prefilled, and merged, as if nothing stood behind them; a backend may keep what that gives for the
        next prompt that starts with the same rows. The others, at least one, then run over it. 0: all rows run
        together. Raises :class:`D3tomError` where the stages were not built for what is asked.
        """


@runtime_checkable
class StageRunner(Protocol):
    """A backend that also runs its stages one at a time, apart from any answer: what diagnosis asks of it."""

    precision: str
    """As for :class:`Backend`."""

    def run_stage(
        self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """The named ``outputs`` of stage ``name``, as new arrays on the host.

        ``name`` is the stage's in the backend's own loop (a key of :meth:`Bundle.stages`: "front", never
        "cached_front"). ``inputs`` are all of its inputs but those with a default, in the shapes and dtypes of its
        :class:`~d3tom_export.stages.contract.StageSpec`; they are neither written to nor kept. Floats go in and come
        out as float32 whatever ``precision`` is. Raises :class:`D3tomError` where the runtime refuses the run.
        """


@runtime_checkable
class StageClock(Protocol):
    """A backend that knows where its time goes. One whose stages run on while the host goes on does not."""

    def stage_seconds(self) -> dict[str, float]:
        """Seconds that each stage ran since the backend was opened, by the names of :class:`StageRunner`."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the loop."""

    embeddings: Floats
    """(B, P, D)."""
    visual_positions: Ints
    """(V,), ascending."""

    @property
    def prefix_tokens(self) -> int:
        """Rows up to the end of the last picture; 0 where there is none."""
        return int(self.visual_positions[-1]) + 1 if len(self.visual_positions) else 0

    @property
    def shared_rows(self) -> int:
        """Rows that questions about the same pictures can share: ``prefix_tokens``, or 0 where nothing follows them."""
        return self.prefix_tokens if self.prefix_tokens < self.embeddings.shape[1] else 0
