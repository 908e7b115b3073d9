"""What ``validate`` looks at: a bundle, and the model that it is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from d3tom_export.backends.select import Graphs
    from d3tom_export.bundle.folder import Bundle
    from d3tom_export.config import GenerationConfig, Loop, MergeConfig
    from d3tom_export.loop.backend import Backend
    from d3tom_export.model.lavida import Lavida
    from d3tom_export.pipeline import Reader
    from d3tom_export.prompt.samples import Sample, TokenSample


class Subject(NamedTuple):
    """A bundle and what it is held against."""

    bundle: Bundle
    model: Lavida
    open: Callable[[Loop, Graphs], Backend]
    loops: Sequence[Loop]
    graphs: Sequence[Graphs]
    """The kinds of graphs to run, one after the other; of a backend that has one kind, that one."""
    both_kinds: bool
    """Whether the backend has two kinds."""
    compared_with: str
    reader: Reader | None
    samples: Sequence[Sample | TokenSample]
    generation: GenerationConfig
    merge: MergeConfig
    share_prefix: bool
