"""What a model is asked, and what it gives: requests, steps, answers, and what it is.

G answer tokens, V visual tokens, K kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from d3tom_export.api.pictures import Picture
from d3tom_export.api.settings import Asked, Settings, check_names
from d3tom_export.config import GenerationConfig, Loop, MergeConfig
from d3tom_export.prompt.pieces import Piece, Said, final_text, pieces_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from d3tom_export.api.settings import Question


@dataclass(frozen=True, init=False, eq=False)
class Request:
    """One question about a picture, several or none, with settings of its own."""

    image: Picture
    question: Question
    settings: Mapping[str, Any]

    def __init__(self, image: Picture, question: Question, **settings: Unpack[Settings]) -> None:
        """Raises :class:`TypeError` for a keyword that is no setting."""
        check_names(settings)
        for name, value in (("image", image), ("question", question), ("settings", dict(settings))):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Step:
    """One denoising step, as it ended."""

    number: int
    """From 1."""
    total: int
    """Steps that the answer has at most: it may end before, where its text is settled or a commit rule is fast."""
    kept: int
    """K, the visual tokens that the layers behind l* saw; V where nothing was merged."""
    visual_tokens: int
    """V."""
    merged: bool
    """Whether this step merged visual tokens, or took those that an earlier one had merged."""
    token_ids: tuple[int, ...]
    """(G,) the answer so far; where nothing is committed yet stands the model's mask token."""
    committed: tuple[int, ...]
    """Positions in ``token_ids`` that this step committed, ascending."""
    said: Said = field(repr=False, compare=False)
    """The ids as far as they will be read, up to an end token or a stop, and with the suffix behind them."""
    _asked: Asked = field(repr=False, compare=False)

    def pieces(self, encoding: str = "utf-8") -> list[Piece]:
        """The answer so far as text in pieces, each "said", "new" (committed at this step) or "mask", for drawing.

        Masks are blocks; a character of which only some bytes are committed is one too. Nothing in it is obeyed by a
        terminal, or lacks in ``encoding``.
        """
        reader = self._asked.reader
        return pieces_of(self.said, reader.tokenizer, reader.config.language.mask_token_id, encoding)

    @cached_property
    def text(self) -> str:
        """The answer so far, with ``░`` for every mask."""
        return "".join(piece.text for piece in self.pieces())

    @cached_property
    def final(self) -> str:
        """What the answer's text begins with for good: all before the first mask but what may be taken back yet.

        It only grows from step to step, and holds no suffix. Empty with ``raw_text``, which has special tokens in it.
        """
        asked = self._asked
        if asked.raw_text:
            return ""
        ids = self.said.ids[: len(self.said.ids) - len(asked.generation.suffix_ids)]
        mask = asked.reader.config.language.mask_token_id
        return final_text(ids, asked.reader.tokenizer, mask, asked.generation.stop_ids)


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    """Up to the first end token, without blanks around it, and on with the suffix; with ``raw_text`` of all ids."""
    token_ids: tuple[int, ...]
    """Up to the end of the answer, and those of the suffix."""
    kept: tuple[int, ...]
    """K at each step."""
    visual_tokens: int
    """V."""
    prompt_tokens: int
    """P, visual ones among them."""
    shared_tokens: int
    """Of these, how many were prefilled for all questions about the picture; 0 without ``share_prefix``."""
    merge: MergeConfig
    generation: GenerationConfig
    """What it was made with, ids of stops and suffix included."""
    backend: str
    kv_cache: bool
    prompt_seconds: float
    """For the tower's look at its pictures and for its embeddings."""
    denoise_seconds: float
    """For its steps. Of answers that ran together, their common time by their number."""

    @property
    def steps(self) -> int:
        """How many ran."""
        return len(self.kept)

    @property
    def mean_kept(self) -> float:
        """Share of the visual tokens that the layers behind l* saw, over the steps; 1 without a picture."""
        return sum(self.kept) / len(self.kept) / self.visual_tokens if self.visual_tokens else 1.0

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types, as ``run --json`` has it."""
        return {
            "text": self.text,
            "answer": self.text,
            "token_ids": list(self.token_ids),
            "backend": self.backend,
            "kv_cache": self.kv_cache,
            "merge": self.merge.to_json(),
            "generation": self.generation.to_json(),
            "prompt_tokens": self.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "shared_tokens": self.shared_tokens,
            "kept": list(self.kept),
            "kept_per_step": list(self.kept),
            "steps": self.steps,
            "seconds": {"prompt": round(self.prompt_seconds, 4), "denoise": round(self.denoise_seconds, 4)},
        }


@dataclass(frozen=True)
class Description:
    """What a model that is open is, and how it answers unless it is told otherwise."""

    folder: str
    model: str
    """The checkpoint's name."""
    family: str
    weights: str
    """"checkpoint", or where its answers mean nothing "random" or "zeros"."""
    sees: bool
    """Whether it takes pictures."""
    layers: int
    max_tokens: int
    """The most that prompt and answer have together."""
    loops: tuple[Loop, ...]
    """That the bundle has stages for."""
    kv_cache: bool
    """Whether the loop that runs is the one with a KV cache."""
    shares_prefix: bool
    """Whether that loop may run with ``share_prefix``."""
    backend: str
    """The runtime's name, with its provider where that is not the CPU."""
    precision: str
    merge: MergeConfig
    generation: GenerationConfig
    system: str | None
    """What the system turn says; None: there is none."""
    validated: bool | None
    """Whether the bundle passed its self-check; None: there was none."""

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return asdict(self)
