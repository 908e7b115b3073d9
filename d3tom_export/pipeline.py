"""From a question and pictures to an answer, on any backend; NumPy only.

P prompt tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig, VisionConfig
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import family_of
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import Floats, StepRecord, denoise
from d3tom_export.loop.prompt_merge import prompt_merge
from d3tom_export.pictures.canvas import count_visual_tokens
from d3tom_export.pictures.seen import SeenPictures, look
from d3tom_export.pictures.views import Views, prepare_padded, prepare_picture
from d3tom_export.prompt.chat import IMAGE_TOKEN_INDEX, answer_text, check_text, raw_text, text_ids, tokenize
from d3tom_export.prompt.conversation import IMAGE_PLACEHOLDER, Conversation, conversation, joined, with_pictures
from d3tom_export.prompt.samples import Sample, TokenSample
from d3tom_export.prompt.settings import PromptSettings
from d3tom_export.prompt.vocabulary import open_tokenizer


def _blind() -> D3tomError:
    return D3tomError("This model is language-only: it has no vision tower to read --image with. Ask in text.")


_CHARACTERS_PER_TOKEN = 256
"""A longer prompt than so many characters for each of the model's positions is not even encoded."""

Question = str | Conversation
"""What is asked: one question, or a conversation that ends with one."""


class Answer(NamedTuple):
    """An answer as the original returns it."""

    token_ids: list[int]
    """Up to the first stop text, with an early exit up to the first end token and with it; then those of the suffix."""
    text: str


@dataclass(frozen=True)
class Reader:
    """Turns questions and pictures into prompts, and ids into text, for one model."""

    config: ModelConfig
    tokenizer: Tokenizer
    prompt: PromptSettings
    ignore_orientation: bool = False
    """Whether picture files are shown as stored, whatever their EXIF orientation, as the release does."""

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig, prompt: PromptSettings | None = None) -> Reader:
        """Read the tokenizer of a checkpoint or bundle folder; ``prompt`` None: the model is asked as its family is."""
        family = family_of(config)
        tokenizer = open_tokenizer(folder, family)
        tokens, rows = tokenizer.get_vocab_size(with_added_tokens=True), config.language.embedding_size
        if tokens > rows:
            raise D3tomError(
                f"The tokenizer of {folder} has {tokens} tokens and the model embeds {rows}. Tokenizer and weights "
                "come from different models; fetch them together."
            )
        return cls(config, tokenizer, PromptSettings.of_family(family) if prompt is None else prompt)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Reader:
        """The reader a bundle was built with."""
        return cls.from_folder(bundle.folder, bundle.config, bundle.manifest.prompt)

    def cut(self, pictures: Iterable[Image.Image], count: int) -> list[Views]:
        """Views of a prompt's ``count`` pictures, which are taken one by one.

        Raises :class:`D3tomError` where the model has no eyes, before the first is taken.
        """
        self._check_eyes(count)
        return [self._views(picture, count) for picture in pictures]

    def _pads(self, pictures: int) -> bool:
        """Whether so many pictures are shown as one view each."""
        return self._vision.pads_several and pictures > 1

    def _views(self, picture: Image.Image, pictures: int) -> Views:
        """Views of one of ``pictures``."""
        return (prepare_padded if self._pads(pictures) else prepare_picture)(picture, self._vision)

    def token_ids(self, question: Question, pictures: int) -> list[int]:
        """Ids of the whole conversation, :data:`IMAGE_TOKEN_INDEX` for each picture.

        A conversation that places no ``<image>`` itself shows its pictures first, each on a line of its own.
        """
        turns = conversation(question, self.prompt.system)
        longest = _CHARACTERS_PER_TOKEN * self.config.language.max_sequence_length
        for turn in turns:
            check_text(turn.content, longest)
        text = joined(self.prompt.template, with_pictures(turns, pictures))
        check_text(text, longest)
        ids = tokenize(
            self.tokenizer,
            text,
            bos=self.prompt.bos,
            drop_token_after_image=self.prompt.drop_token_after_image,
        )
        rows = self.config.language.vocab_rows
        if not ids:
            raise D3tomError("The model's tokenizer gives no token for this prompt. Fetch the tokenizer again.")
        if ids.count(IMAGE_TOKEN_INDEX) != pictures:
            raise D3tomError(
                f"This bundle's chat template places pictures of its own with {IMAGE_PLACEHOLDER}, which stands for "
                "those that are given. Build the bundle again."
            )
        if max(ids) >= rows:
            raise D3tomError(
                f"The tokenizer gives token {max(ids)} and the model embeds {rows} tokens. Tokenizer and weights come "
                "from different models; fetch them together."
            )
        return ids

    def check_text(self, question: Question, pictures: int, generation: GenerationConfig) -> None:
        """Refuse what :meth:`check_length` would whatever the pictures, before any of them is opened."""
        self._check_eyes(pictures)
        shown = pictures * self._vision.tokens_per_view if pictures else 0
        self._check_length(self.token_ids(question, pictures), pictures, shown, generation, "at least ")

    def check_length(
        self, question: Question, pictures: Sequence[Image.Image | Views], generation: GenerationConfig
    ) -> list[int]:
        """Refuse a prompt that does not fit the model together with its answer; no picture is prepared for it.

        Returns the prompt's ids (:meth:`token_ids`). Raises :class:`D3tomError`.
        """
        self._check_eyes(len(pictures))
        ids = self.token_ids(question, len(pictures))
        padded = bool(pictures) and self._pads(len(pictures))
        visual = sum(
            shown.packing.visual_tokens
            if isinstance(shown, Views)
            else count_visual_tokens(shown.size, self._vision, padded=padded)
            for shown in pictures
        )
        self._check_length(ids, len(pictures), visual, generation)
        return ids

    def read(
        self,
        backend: Backend,
        question: Question,
        pictures: Sequence[Image.Image | Views],
        generation: GenerationConfig,
        seen: SeenPictures | None = None,
    ) -> Prompt:
        """Embed a question and its pictures on ``backend``; a picture that ``seen`` remembers is not encoded again."""
        ids = self.check_length(question, pictures, generation)
        eyes = look if seen is None else seen.look
        visual = []
        for picture in pictures:
            views = picture if isinstance(picture, Views) else self._views(picture, len(pictures))
            visual.append(eyes(backend, views))
        return splice(backend, ids, visual)

    def _check_eyes(self, pictures: int) -> None:
        if pictures and self.config.vision is None:
            raise _blind()

    def _check_length(
        self, ids: list[int], pictures: int, visual: int, generation: GenerationConfig, about: str = ""
    ) -> None:
        length, language = len(ids) - pictures + visual, self.config.language
        most = language.max_prompt_length
        if most is not None and length > most:
            raise D3tomError(
                f"The prompt has {about}{length} tokens ({visual} of them visual), and this model reads {most}: the "
                "original cuts longer ones off without a word. Shorten the prompt or show a smaller picture."
            )
        limit, suffix = language.max_sequence_length, len(generation.suffix_ids)
        if length + generation.gen_length + suffix > limit:
            behind = f" and {suffix} of its suffix" if suffix else ""
            raise D3tomError(
                f"The prompt has {about}{length} tokens ({visual} of them visual); with {generation.gen_length} answer "
                f"tokens{behind} that exceeds this model's limit of {limit}. "
                "Shorten the prompt, show fewer pictures or ask for a shorter answer (--gen-length)."
            )

    def with_ends(self, generation: GenerationConfig) -> GenerationConfig:
        """``generation`` with this model's end tokens, and with its own stops where there are none."""
        stops = generation.stop_ids or self.stop_ids(self.prompt.stop)
        return replace(generation, stop_ids=stops, end_ids=self.end_ids)

    def stop_ids(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Ids of texts that end an answer, as :attr:`GenerationConfig.stop_ids` has them.

        Raises :class:`D3tomError` for a text that is no token.
        """
        return tuple(text_ids(self.tokenizer, text, "The stop text") for text in texts)

    def suffix_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text that stands behind the answer, as :attr:`GenerationConfig.suffix_ids` has them."""
        return text_ids(self.tokenizer, text, "The suffix")

    def answer(self, record: StepRecord, generation: GenerationConfig, *, raw: bool = False, row: int = 0) -> Answer:
        """What a row of ``record``, an answer's last step, says.

        The text goes up to the first end token, and on with the suffix; with ``raw`` it is that of all ids, as the
        release prints them.
        """
        said, suffix = record.tokens[row, : record.end[row]].tolist(), generation.suffix_ids
        if generation.early_exit:  # what lies behind may be masks
            said = said[: next((at + 1 for at, token in enumerate(said) if token in generation.end_ids), None)]
        ids = [*said, *suffix]
        if raw:
            return Answer(ids, raw_text(self.tokenizer, ids))
        return Answer(ids, answer_text(self.tokenizer, said, set(self.end_ids), suffix))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which an answer's text ends, as :attr:`GenerationConfig.end_ids` has them."""
        ends = {self.tokenizer.token_to_id(token) for token in self.prompt.end_tokens}
        return tuple(sorted({*self.config.language.eos_token_ids, *(end for end in ends if end is not None)}))

    @property
    def _vision(self) -> VisionConfig:
        assert self.config.vision is not None
        return self.config.vision


def splice(backend: Backend, ids: Sequence[int], visual: Sequence[Floats]) -> Prompt:
    """The prompt of ``ids``, with the visual tokens (V, D) of each picture for its :data:`IMAGE_TOKEN_INDEX`."""
    text = backend.embed_tokens(np.array([[0 if token == IMAGE_TOKEN_INDEX else token for token in ids]]))[0]
    pieces, positions, remaining = [], [], iter(visual)
    start = 0
    for index, token in enumerate(ids):
        if token == IMAGE_TOKEN_INDEX:
            pieces.append(next(remaining))
            positions.append(np.arange(start, start + len(pieces[-1])))
        else:
            pieces.append(text[index : index + 1])
        start += len(pieces[-1])
    return Prompt(
        np.concatenate(pieces)[None].astype(np.float32),
        np.concatenate(positions).astype(np.int64) if positions else np.zeros(0, dtype=np.int64),
    )


def embed_sample(
    backend: Backend, sample: Sample | TokenSample, reader: Reader | None, generation: GenerationConfig
) -> Prompt:
    """A sample's prompt on ``backend``; ``reader`` may be None for a sample of tokens."""
    if isinstance(sample, TokenSample):
        return Prompt(backend.embed_tokens(sample.token_ids), sample.visual_positions)
    assert reader is not None, "a sample with a question needs a tokenizer"
    pictures = [] if sample.picture is None else [sample.picture]
    return reader.read(backend, sample.question, pictures, generation)


def run_loop(
    backend: Backend,
    prompt: Prompt,
    mask_token_id: int,
    generation: GenerationConfig,
    merge: MergeConfig,
    *,
    logits: bool = False,
    share_prefix: bool = False,
    seeds: Sequence[int] | None = None,
) -> Iterator[StepRecord]:
    """The denoising loop (:func:`d3tom_export.loop.denoise.denoise`) for ``prompt`` on ``backend``.

    Of ``merge``, what holds in the backend's kind of loop (:meth:`MergeConfig.in_loop`). With ``share_prefix`` the
    prompt's rows up to the end of its last picture are prefilled without what follows, and once for all questions about
    it where the backend keeps that. That is another model of the prompt: those rows do not see the question. A prompt
    without a picture, or with nothing behind it, runs as ever. ``seeds`` are each row's own. Raises :class:`D3tomError`
    for a merge that the loop with a KV cache does not do, and where the backend cannot share.
    """
    merge = merge.in_loop(backend.kv_cache)
    if backend.kv_cache:
        merge.check_cached()
    elif share_prefix:
        raise D3tomError(
            "Questions share a picture's prefill in the loop with a KV cache alone. Run that with --kv-cache, or leave "
            "--share-prefix out."
        )
    batch, visual_tokens = len(prompt.embeddings), len(prompt.visual_positions)
    at_prefill = prompt_merge(merge, generation, mask_token_id, batch=batch, visual_tokens=visual_tokens, logits=logits)
    merges = merge.schedule != "none" and visual_tokens > 0 and at_prefill is None
    session = backend.start(
        prompt.embeddings,
        prompt.visual_positions,
        merges=merges,
        prompt_merge=at_prefill,
        shared_rows=prompt.shared_rows if share_prefix else 0,
    )
    return denoise(
        session,
        batch=batch,
        visual_tokens=visual_tokens,
        mask_token_id=mask_token_id,
        generation=generation,
        merge=merge,
        logits=logits,
        seeds=seeds,
    )
