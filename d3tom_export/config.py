"""Validated, frozen configuration: what a checkpoint is, how it merges, how it answers.

Field names on the checkpoint side are those of LLaDA's released ``config.json``, whatever a family's own calls them
(:mod:`d3tom_export.families`). This module imports neither torch nor any runtime.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.fields import shown

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Choices:
    """Which columns of the logits are tokens that may be chosen, and which of them count for a token's probability."""

    rows: int
    """The first so many are tokens; what lies behind them is never chosen and stands in every softmax."""
    banned: tuple[int, ...] = ()
    """Of these the logits become -infinity before anything is chosen or ranked."""


@dataclass(frozen=True)
class LanguageConfig:
    """The transformer that all families share (LLaDA's field names; sizes in elements)."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_rows: int
    """Rows of the embedding table that are in use: the ids below it are tokens, and only they can be chosen. The
    release cuts the table to the tokenizer's length (lavida.md A4)."""
    head_rows: int
    """Rows of the language head that are in use, ``vocab_rows`` or more: the columns of the logits. The release cuts
    the head only where ``tie_word_embeddings`` is false; LLaDA's config.json lacks the field, which means true. Rows
    without a token stand in every softmax and are never chosen (the release stops with an IndexError at one)."""
    embedding_size: int
    """Rows stored in the checkpoint's embedding table and head."""
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    rope_theta: float
    rms_norm_eps: float
    max_sequence_length: int
    include_qkv_bias: bool
    max_prompt_length: int | None = None
    """Tokens of a prompt, visual ones among them, where the original cuts longer ones; None: only the sequence's."""
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that an answer never takes; an end token among them leaves ending an answer to another."""
    row_shift: bool = False
    """Whether the hidden state of a position predicts the token of the next one, as in models that were autoregressive
    once: answer slot j reads row P+j-1 of the sequence (spec-lavida-dream.md, 5)."""

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads

    @property
    def choices(self) -> Choices:
        """What may be chosen of the head's ``head_rows`` columns."""
        return Choices(self.vocab_rows, self.banned_token_ids)


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower, the pooling behind the projector and the anyres views (lavida.md B)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Layers of the full tower. A checkpoint stores all of them, or all but the last, as the release does."""
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    grid_pinpoints: tuple[tuple[int, int], ...]
    """Canvas sizes (width, height) in pixels that a picture may be spread over."""
    pooled: bool = True
    """Whether each view's token grid is pooled 2x2, bilinearly, behind the projector."""
    max_views: int | None = None
    """N of "anyres_max_N": tiles whose tokens are more than N views have are resized to about so many (None: never)."""
    pads_several: bool = False
    """Whether several pictures in one prompt are shown as one view each, padded to squares, and not on canvases."""

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        """Side of a view's token grid; pooled, half as many: ceil, as the release has it for "bilinear"."""
        return -(-self.patches_per_side // 2) if self.pooled else self.patches_per_side

    @property
    def tokens_per_view(self) -> int:
        return self.tokens_per_side**2


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint: the language model and, unless it is language-only, its eyes."""

    family: str
    """What it is one of, by a name of :data:`d3tom_export.families.registry.FAMILIES`."""
    language: LanguageConfig
    vision: VisionConfig | None


Loop = Literal["uncached", "cached"]
LOOPS: tuple[Loop, ...] = get_args(Loop)
"""The denoising loops: the whole sequence at every step, or the answer's rows with the prompt's keys and values kept
(LaViDa's prefix mode)."""

MergeSchedule = Literal["adaptive", "fixed", "none"]
SelectionPolicy = Literal["decider", "random", "uniform", "fastv"]
Aggregation = Literal["sum", "mean"]
MergedPositions = Literal["compact", "original"]
MergeAt = Literal["step", "prefill"]
Remerge = Literal["every-step", "on-change", "per-block"]
StepSchedule = Literal["none", "shift", "cosine", "logit_normal", "linear", "vanilla"]
Remasking = Literal["low_confidence", "margin", "entropy", "random"]
CommitRule = Literal["plan", "threshold", "factor", "frechet"]
Deciders = Literal["committed", "looking"]

QuantFormat = Literal["int4", "int8", "fp8", "nvfp4"]
QUANT_FORMATS: tuple[QuantFormat, ...] = get_args(QuantFormat)
"""What weights may be stored in beside floating-point numbers of 16 bits and more."""
QUANT_METHOD = "d3tom-export"
"""What a ``config.json`` calls the method by which this tool quantized the weights beside it."""

CertaintyKind = Literal["probability", "margin", "entropy"]
"""What positions are ranked by: the token's probability, the difference of the two largest, or the negative entropy."""


@dataclass(frozen=True)
class Certainty:
    """How sure a position is, where that is not its likeliest token's probability among all, in float64."""

    kind: CertaintyKind
    top_k: int | None = None
    """Of the ``top_k`` likeliest tokens alone, renormalised; None: of all."""
    top_p: float | None = None
    """Of the likeliest tokens alone whose probabilities, but for the last one's, sum to at most this; None: of all."""

    single: bool = False
    """Whether probabilities are rounded to float32 before they are compared, as Dream's are, so that those next to 1
    tie."""

    @property
    def whole(self) -> bool:
        """Whether it is that of the whole distribution."""
        return self.top_k is None and self.top_p is None


def remasking_mode(name: str) -> Remasking:
    """A remasking mode by name: LaViDa's "entrophy" and Dream's ``alg`` are spellings of ours."""
    spelt = {"entrophy": "entropy", "topk_margin": "margin", "maskgit_plus": "low_confidence"}
    return spelt.get(name, name) if isinstance(name, str) else name  # type: ignore[return-value]


def _check_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise D3tomError(f"{name} is {value!r}, expected one of {listing(allowed)}.")


@dataclass(frozen=True)
class CacheMergeConfig:
    """What the loop with a KV cache may do otherwise than the release. The defaults are the release's behaviour."""

    adaptive: bool = False
    """Whether the adaptive schedule applies. The release passes no step to its cached merge, so the ratio is fixed
    there whatever the schedule says (lavida.md E3)."""
    restore_norm: bool = True
    """Whether merged rows are scaled back to the mean norm of the rows that were kept."""
    text_targets: bool = True
    """Whether a dropped visual token may join a text row of the cache."""
    remerge: Remerge = "every-step"
    """How often the cache is merged anew: at every step; when another set of tokens is kept, which gives the same
    answer for less work; or at a block's first merging step, whose choice then holds for the block."""

    def __post_init__(self) -> None:
        _check_choice("remerge", self.remerge, Remerge)


@dataclass(frozen=True)
class MergeConfig:
    """How visual tokens are merged. The defaults after ``ratio`` are the release's behaviour."""

    layer: int
    """l*, the 0-based block in which visual tokens merge; fixed once stages are exported."""
    ratio: float
    """alpha, the share of visual tokens merged away, in [0, 1)."""
    schedule: MergeSchedule = "adaptive"
    """"adaptive" starts at a ratio of 1 and falls; "fixed" keeps ``ratio``; "none" never merges."""
    select: SelectionPolicy = "decider"
    """Who decides which tokens stay: the decider tokens, or a comparison policy that drops the others unmerged."""
    aggregate: Aggregation = "sum"
    """How a kept token takes in those merged into it. The release sums."""
    positions: MergedPositions = "compact"
    """Rotary positions after the merge: renumbered from 0 (the release), or those of the unmerged sequence."""
    cache: CacheMergeConfig = field(default_factory=CacheMergeConfig)
    """What concerns the loop with a KV cache alone."""
    keep_multiple: int = 1
    """K is rounded up to a multiple of this, at most to V, so that steps and pictures share few values of K, which is
    what runtimes tune kernels and capture graphs for. The release does not round; rounding changes answers."""
    merge_at: MergeAt = "step"
    """When the loop with a KV cache merges: at its steps, as released, or once, while the prompt is prefilled. There
    the answer's mask tokens decide, the ratio is fixed, and what is not kept is merged whatever the policy, as in the
    loop without a cache."""
    deciders: Deciders = "committed"
    """Which tokens decide: all that the step before committed, or of them those that look at the picture. End tokens
    and padding do not, where others were committed too; the masks before the first of them decide in their place."""

    def __post_init__(self) -> None:
        if type(self.keep_multiple) is not int or self.keep_multiple < 1:
            raise D3tomError(
                f"keep multiple {self.keep_multiple!r} is not a whole number of at least 1. The number of kept tokens "
                "is rounded up to a multiple of it; 1 does not round."
            )
        for name, value, kinds in (("layer", self.layer, int), ("ratio", self.ratio, (int, float))):
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise D3tomError(f"merge {name} is {shown(value)}, expected a number.")
        if not 0.0 <= self.ratio < 1.0:
            raise D3tomError(
                f"merge ratio {self.ratio} is outside [0, 1). It is the share of visual tokens merged away: "
                "0.9 keeps about one in ten. At least one token is always kept."
            )
        _check_choice("merge schedule", self.schedule, MergeSchedule)
        _check_choice("selection policy", self.select, SelectionPolicy)
        _check_choice("deciders", self.deciders, Deciders)
        _check_choice("aggregation", self.aggregate, Aggregation)
        _check_choice("positions after merging", self.positions, MergedPositions)
        _check_choice("merge_at", self.merge_at, MergeAt)

    def check_layer(self, n_layers: int) -> None:
        """Refuse a merge layer outside a model of ``n_layers`` blocks, or at the prefill one that nothing follows."""
        if not 0 <= self.layer < n_layers:
            raise D3tomError(
                f"merge layer {self.layer} is outside this model: it has {n_layers} layers, so --layer takes "
                f"0 to {n_layers - 1}. The paper merges early (2 or 3)."
            )
        if self.merge_at == "prefill" and self.layer == n_layers - 1:
            raise D3tomError(
                f"merge layer {self.layer} is this model's last, and no layer behind it would read what the prefill "
                f"merges there. With --merge-at prefill, --layer takes 0 to {n_layers - 2}."
            )

    def check_cached(self) -> None:
        """Refuse what the loop with a KV cache does not do."""
        if self.merge_at == "prefill":
            if self.select not in ("decider", "uniform") or self.positions != "compact":
                raise D3tomError(
                    "A prompt is merged at its prefill with select decider or uniform and compact positions only. "
                    f"Found select {self.select}, {self.positions} positions; run these without the cache."
                )
        elif (self.select, self.aggregate, self.positions) != ("decider", "sum", "compact"):
            raise D3tomError(
                "The KV-cache loop merges at its steps with select decider, aggregate sum and compact positions only. "
                f"Found select {self.select}, aggregate {self.aggregate}, {self.positions} positions; run these "
                "without the cache."
            )

    def check_built_for_prefill(self) -> None:
        """Refuse to merge a prompt at its prefill with stages that were built for this configuration and cannot."""
        if self.merge_at != "prefill":
            raise D3tomError(
                "This bundle's stages do not merge a prompt at its prefill: it was built with --merge-at step. Build "
                "one with `d3tom-export build --kv-cache --merge-at prefill`, or run this one with --merge-at step."
            )

    def in_loop(self, kv_cache: bool) -> MergeConfig:
        """What of this configuration holds in the loop with a KV cache, or in the one without."""
        if not kv_cache:
            return replace(self, cache=CacheMergeConfig(), merge_at="step")
        if self.schedule == "adaptive" and (self.merge_at == "prefill" or not self.cache.adaptive):
            return replace(self, schedule="fixed")
        return self

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> MergeConfig:
        return cls(**raw | {"cache": CacheMergeConfig(**raw["cache"])})


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is denoised (algorithm.md, "Denoising"; released argument names where they exist)."""

    gen_length: int
    """G, answer tokens."""
    block_length: int | None = None
    """Tokens of a block, a divisor of ``gen_length``; None: one block."""
    steps: int | None = None
    """Steps of the whole answer; None: one per token. With ``step_ratio`` too, what the times of "vanilla" are laid out
    for, whose last step commits what is left."""
    step_ratio: float | None = None
    """Steps per block as a share of the block's length; None: as many as ``steps`` says."""
    schedule: StepSchedule = "none"
    """How many tokens each step commits (:mod:`d3tom_export.loop.step_plan`)."""
    shift: float = 3.0
    """Parameter of the "shift" schedule. The release's default is 3; the LaViDa paper finds 1/3 better."""
    commit: CommitRule = "plan"
    """What says how many tokens a step commits: the plan of ``steps`` and ``schedule``, or how sure the model is of
    them (:mod:`d3tom_export.loop.commit_rules`), so that the number of steps is not known beforehand."""
    threshold: float = 0.9
    """Of "threshold": the probability from which tokens are committed."""
    factor: float = 1.0
    """Of "factor": the n-th surest token needs a probability of 1 - factor / (n + 1)."""
    margin: float = 0.0
    """Of "frechet": by how much the lower bound of all being right has to exceed the upper bound of the last not."""
    max_steps: int | None = None
    """Steps of a block that a rule has at most; the last of them commits all that is left. None: one per token."""
    remasking: Remasking = "low_confidence"
    temperature: float = 0.0
    """0 takes the most likely token; above, Gumbel-max sampling."""
    top_k: int | None = None
    """How many of the likeliest tokens are drawn from, and ranked by; None: all."""
    top_p: float | None = None
    """The probability that the tokens before the last one drawn from sum to at most; None: 1, all of them."""
    rank_drawn: bool = False
    """Whether positions are ranked by the distribution that tokens are drawn from, at its temperature and cut by
    ``top_k`` and ``top_p`` (Dream's way), or by the model's own (LLaDA's, which has no such cuts)."""
    stop_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end an answer; nothing is committed at or behind the first one (spec-llada-v.md, 6)."""
    suffix_ids: tuple[int, ...] = ()
    """Tokens that stand behind the answer from the first step on: it is written to lead up to them."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer's text, ascending; what the model says behind the first of them is not read."""
    early_exit: bool = False
    """Whether the answer ends as soon as its text cannot change any more: where an end token, or a stop, is committed
    and no mask is left before it. The text is the same, and what is behind it remains masks."""
    fill_after_end: bool = False
    """Whether all that is behind the first end token is committed with it, as end tokens; this may change answers."""
    seed: int = 0
    """Row b of a batch draws its noise from ``seed + b`` alone, so rows do not depend on one another."""

    def __post_init__(self) -> None:
        _check_choice("step schedule", self.schedule, StepSchedule)
        _check_choice("remasking", self.remasking, Remasking)
        _check_choice("commit rule", self.commit, CommitRule)
        problems = []
        for name in ("gen_length", "block_length", "steps", "top_k", "max_steps", "seed"):
            value = getattr(self, name)
            optional = name in ("block_length", "steps", "top_k", "max_steps")
            if type(value) is not int and not (optional and value is None):
                problems.append(f"{name} is {value!r}, expected an integer")
        for name in ("step_ratio", "shift", "temperature", "top_p", "threshold", "factor", "margin"):
            value = getattr(self, name)
            finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not finite and not (name in ("step_ratio", "top_p") and value is None):
                problems.append(f"{name} is {value!r}, expected a finite number")
        ids = (token for tokens in (*self.stop_ids, self.suffix_ids, self.end_ids) for token in tokens)
        if not all(self.stop_ids) or any(type(token) is not int or token < 0 for token in ids):
            problems.append("stop_ids, suffix_ids and end_ids hold something else than token ids")
        if problems:
            raise D3tomError(f"These generation settings cannot work: {'; '.join(problems)}.")
        if self.gen_length < 1:
            problems.append(f"answer length is {self.gen_length}, expected at least 1")
        elif self.block < 1 or self.gen_length % self.block:
            problems.append(f"block length {self.block} does not divide the answer length {self.gen_length}")
        if self.steps is not None and self.steps < 1:
            problems.append(f"steps is {self.steps}, expected at least 1")
        elif self.steps is not None and not problems and self.steps % self.blocks:
            problems.append(f"{self.steps} steps do not divide into {self.blocks} blocks")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p is {self.top_p}, expected a value in (0, 1]")
        problems += self._rule_problems()
        if (self.top_k is not None or self.top_p is not None) and not self.rank_drawn:
            problems.append("top_k and top_p are for models whose tokens are ranked by the distribution drawn from")
        if self.step_ratio is not None and not 0.0 < self.step_ratio <= 1.0:
            problems.append(f"step ratio is {self.step_ratio}, expected a value in (0, 1]")
        elif not problems and self.steps_per_block < 1:
            problems.append(f"step ratio {self.step_ratio} leaves no step for a block of {self.block} tokens")
        if not 0.001 <= self.shift <= 1000:
            problems.append(f"shift is {self.shift}, expected a value in [0.001, 1000]")
        if self.temperature < 0:
            problems.append(f"temperature is {self.temperature}, expected 0 or more")
        if self.seed < 0:
            problems.append(f"seed is {self.seed}, expected 0 or more")
        if problems:
            raise D3tomError(f"These generation settings cannot work: {'; '.join(problems)}.")

    def _rule_problems(self) -> list[str]:
        """What is wrong with the settings of commit rules."""
        problems = []
        if not 0.0 < self.threshold <= 1.0:
            problems.append(f"threshold is {self.threshold}, expected a probability in (0, 1]")
        if not self.factor > 0.0:
            problems.append(f"factor is {self.factor}, expected more than 0")
        if not 0.0 <= self.margin < 1.0:
            problems.append(f"margin is {self.margin}, expected a value in [0, 1)")
        if self.max_steps is not None and self.max_steps < 1:
            problems.append(f"max_steps is {self.max_steps}, expected at least 1")
        if self.planned and self.max_steps is not None:
            problems.append("max_steps is for answers without a plan, whose steps are steps or step_ratio")
        if not self.planned and self.remasking != "low_confidence":
            problems.append(
                f"commit rule {self.commit} compares probabilities, which is remasking low_confidence, not "
                f"{self.remasking}"
            )
        return problems

    def changed(self, **changes: Any) -> GenerationConfig:
        """These settings with ``changes``, and without what stood in the way of them.

        A number of steps takes the place of a share of them, and an answer shorter than a block is one block. A commit
        rule ranks by probability, whatever the plan before it did, and a plan knows no most of steps.

        Raises :class:`D3tomError` for a setting of another commit rule than the one that is taken.
        """
        if "steps" in changes:
            changes.setdefault("step_ratio", None)
        rule = changes.get("commit", self.commit)
        for name, of_rule in (("threshold", "threshold"), ("factor", "factor"), ("margin", "frechet")):
            if name in changes and rule != of_rule:
                raise D3tomError(f"{name} is for commit rule {of_rule}, and answers here are committed by {rule}.")
        if "commit" in changes:
            changes.setdefault(*(("max_steps", None) if rule == "plan" else ("remasking", "low_confidence")))
        if self.block_length is not None and changes.get("gen_length", self.gen_length) < self.block_length:
            changes.setdefault("block_length", None)
        return replace(self, **changes)

    @property
    def block(self) -> int:
        """Tokens per block."""
        return self.gen_length if self.block_length is None else self.block_length

    @property
    def planned(self) -> bool:
        """Whether a plan says how many tokens each step commits."""
        return self.commit == "plan"

    @property
    def blocks(self) -> int:
        """How many blocks an answer has."""
        return self.gen_length // self.block

    @property
    def planned_steps(self) -> int:
        """Steps of a block as ``steps`` says: at most one per token."""
        return self.block if self.steps is None else min(self.steps // self.blocks, self.block)

    @property
    def steps_per_block(self) -> int:
        """T: what is planned, or the share ``step_ratio`` of the block's tokens (truncated).

        "vanilla" has no times for more steps than were planned; the original stops with an IndexError there.
        """
        if self.step_ratio is None:
            return self.planned_steps
        share = int(self.block * self.step_ratio)
        return min(share, self.planned_steps) if self.schedule == "vanilla" else share

    @property
    def total_steps(self) -> int:
        """Steps of all blocks, where nothing ends the answer before; under a commit rule as many as it can take."""
        return self.blocks * (self.steps_per_block if self.planned else min(self.max_steps or self.block, self.block))

    @property
    def certainty(self) -> Certainty | None:
        """What positions are ranked by, where it is not the likeliest token's probability among all, or noise."""
        if self.remasking == "random":
            return None
        kind: CertaintyKind = "probability" if self.remasking == "low_confidence" else self.remasking
        certainty = Certainty(kind, self.top_k, None if self.top_p == 1 else self.top_p, self.rank_drawn)
        return None if certainty == Certainty("probability") else certainty

    @property
    def greedy(self) -> bool:
        """Whether the most likely token and its probability are all that a step needs."""
        return self.temperature == 0 and self.remasking != "random" and self.certainty is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> GenerationConfig:
        sequences = {name: tuple(raw[name]) for name in ("suffix_ids", "end_ids")}
        return cls(**raw | {"stop_ids": tuple(map(tuple, raw["stop_ids"])), **sequences})
