"""Validated, frozen configuration: what a checkpoint is, how it merges, how it answers.

Field names on the checkpoint side are those of the released ``config.json``; nothing is guessed from a default where
the original would silently fall back to a GPT-2-like value (see :data:`REQUIRED_LANGUAGE_FIELDS`).
This module imports neither torch nor any runtime.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.fields import LARGEST_SIZE, canvas_sizes, fixed_field_problems, number_problems, shown

CONFIG_FILE = "config.json"

REQUIRED_LANGUAGE_FIELDS = (
    "d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "mask_token_id", "rope_theta", "rms_norm_eps",
)  # fmt: skip
"""Language fields without a safe default: the original's dataclass defaults (768 wide, no RoPE, tied weights) describe
a different architecture, so a missing field is an error rather than a surprise."""

FIXED_LANGUAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "rope": (True,),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "attention_layer_norm": (False,),
    "weight_tying": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "alibi": (False,),
    "include_bias": (False,),
}
"""Fields that select an architecture; a value outside the listed ones names a model this package does not build."""

FIXED_VISION_FIELDS: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": ("anyres",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_resampler_type": (None,),
}

REQUIRED_VISION_FIELDS = ("image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type", "mm_spatial_pool_mode")
"""Vision fields whose absence means something else to the release: one plain view, rows without newlines ("flat"), one
linear layer for a projector, and no pooling that it could name. No resampler is what an absent one means there too."""

_MOST_LAYERS = 1024
"""Of a transformer. The deepest published have a few hundred."""

_LONGEST_SEQUENCE = 2**24
"""Tokens. Beyond, float32, in which rotary angles are computed, has no whole number for every position."""

POSITIONS = 4096
"""Where a config does not say: the released class's ``max_sequence_length``, as LLaDA's is."""

_MOST_EOS_TOKENS = 64


def _reject(source: str, problems: list[str]) -> None:
    if problems:
        raise D3tomError(
            f"{source} does not describe a model this tool can build: {'; '.join(problems)}. "
            "Compare it with the config.json of a LaViDa-LLaDA checkpoint and correct these fields."
        )


@dataclass(frozen=True)
class LanguageConfig:
    """The LLaDA transformer (released field names; sizes in elements)."""

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

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_json(cls, raw: dict[str, Any], vocab_rows: int | None, source: str) -> LanguageConfig:
        """Read the released fields of ``raw``; every problem found is reported in one :class:`D3tomError`.

        ``vocab_rows`` clips the embedding table, and the head where the release does (None: all stored rows are used).
        """
        missing = [name for name in REQUIRED_LANGUAGE_FIELDS if raw.get(name) is None]
        problems = [f"required field {name} is missing" for name in missing]
        problems += fixed_field_problems(raw, FIXED_LANGUAGE_FIELDS)
        problems += number_problems(
            raw,
            integers={
                **dict.fromkeys(("d_model", "n_heads", "n_kv_heads", "mlp_hidden_size"), LARGEST_SIZE),
                **dict.fromkeys(("vocab_size", "embedding_size"), LARGEST_SIZE),
                "n_layers": _MOST_LAYERS,
                "max_sequence_length": _LONGEST_SEQUENCE,
            },
            floats={"rope_theta": (1, 1e12), "rms_norm_eps": (1e-30, 1)},
        )
        problems += [
            f"{name} is {shown(raw[name])}, expected true or false"
            for name in ("include_qkv_bias", "multi_query_attention")
            if raw.get(name) is not None and type(raw[name]) is not bool
        ]
        tied = raw.get("tie_word_embeddings", True)  # transformers' default, which the release's resizing goes by
        if not isinstance(tied, (bool, type(None))):
            problems.append(f"tie_word_embeddings is {shown(tied)}, expected true or false")
        eos = raw.get("eos_token_id")
        stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
        for name, ids in (("mask_token_id", [raw.get("mask_token_id")]), ("eos_token_id", stops)):
            if name not in missing and any(type(token) is not int or not 0 <= token <= LARGEST_SIZE for token in ids):
                problems.append(f"{name} is {shown(raw[name])}, expected a token id")
        if len(stops) > _MOST_EOS_TOKENS:
            problems.append(f"eos_token_id has {len(stops):,} ids, at most {_MOST_EOS_TOKENS} are supported")
        _reject(source, problems)

        n_heads = raw["n_heads"]
        n_kv_heads = raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else n_heads)
        if raw["d_model"] % n_heads or (raw["d_model"] // n_heads) % 2:
            problems.append(f"d_model {raw['d_model']} does not split into {n_heads} heads of even size")
        if n_heads % n_kv_heads:
            problems.append(f"n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
        embedding_size = raw.get("embedding_size") or raw["vocab_size"]
        if raw["vocab_size"] > embedding_size:
            problems.append(f"vocab_size {raw['vocab_size']:,} exceeds embedding_size {embedding_size:,}")
        rows = embedding_size if vocab_rows is None else min(vocab_rows, embedding_size)
        if not 0 <= raw["mask_token_id"] < rows:
            problems.append(
                f"mask_token_id {raw['mask_token_id']} lies outside the {rows} usable vocabulary rows (rows beyond "
                "the tokenizer's length are cut off unless --full-vocabulary keeps them)"
            )
        _reject(source, problems)
        return cls(
            d_model=raw["d_model"],
            n_layers=raw["n_layers"],
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            mlp_hidden_size=raw["mlp_hidden_size"],
            vocab_rows=rows,
            head_rows=embedding_size if tied else rows,
            embedding_size=embedding_size,
            mask_token_id=raw["mask_token_id"],
            eos_token_ids=tuple(stops),
            rope_theta=float(raw["rope_theta"]),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            max_sequence_length=raw.get("max_sequence_length") or POSITIONS,
            include_qkv_bias=bool(raw.get("include_qkv_bias", False)),
        )


SIGLIP_SO400M_PATCH14_384: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
"""Geometry of google/siglip-so400m-patch14-384 (its published config.json), which released checkpoints name by path
without repeating it; a ``vision_config`` in config.json takes its place."""


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

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        """Side of a view's token grid after 2x2 bilinear pooling: ceil, as the release has it for "bilinear"."""
        return -(-self.patches_per_side // 2)

    @property
    def tokens_per_view(self) -> int:
        return self.tokens_per_side**2

    @classmethod
    def from_json(cls, raw: dict[str, Any], source: str) -> VisionConfig:
        problems = [f"required field {name} is missing" for name in REQUIRED_VISION_FIELDS if raw.get(name) is None]
        problems += fixed_field_problems(raw, FIXED_VISION_FIELDS)
        tower = raw.get("vision_config")
        if tower is None:
            name = raw.get("mm_vision_tower")
            if not isinstance(name, str) or "siglip-so400m-patch14-384" not in name:
                problems.append(
                    f"mm_vision_tower is {shown(name)} and no vision_config gives its geometry "
                    "(known without one: google/siglip-so400m-patch14-384)"
                )
            tower = SIGLIP_SO400M_PATCH14_384
        elif not isinstance(tower, dict):
            problems.append(f"vision_config is {shown(tower)}, expected an object with the tower's geometry")
            _reject(source, problems)
        problems += fixed_field_problems(tower, {"hidden_act": ("gelu_pytorch_tanh",)})
        sizes = dict.fromkeys((name for name in SIGLIP_SO400M_PATCH14_384 if name != "layer_norm_eps"), LARGEST_SIZE)
        problems += number_problems(
            tower,
            integers={**sizes, "num_hidden_layers": _MOST_LAYERS},
            floats={"layer_norm_eps": (1e-30, 1)},
            prefix="vision_config.",
        )
        missing = [key for key in SIGLIP_SO400M_PATCH14_384 if key != "layer_norm_eps" and not tower.get(key)]
        problems += [f"required field vision_config.{key} is missing" for key in missing]
        pinpoints = raw.get("image_grid_pinpoints") or []
        if not pinpoints:
            problems.append("required field image_grid_pinpoints is missing")
        _reject(source, problems)
        side = tower["image_size"]
        if tower["patch_size"] > side:
            problems.append(f"vision_config.patch_size {tower['patch_size']:,} exceeds image_size {side:,}")
        grid, canvas_problems = canvas_sizes("image_grid_pinpoints", pinpoints, side)
        problems += canvas_problems
        if tower["hidden_size"] % tower["num_attention_heads"]:
            problems.append(
                f"vision_config.hidden_size {tower['hidden_size']} does not split into "
                f"{tower['num_attention_heads']} heads"
            )
        _reject(source, problems)
        return cls(
            hidden_size=tower["hidden_size"],
            intermediate_size=tower["intermediate_size"],
            num_hidden_layers=tower["num_hidden_layers"],
            num_attention_heads=tower["num_attention_heads"],
            image_size=side,
            patch_size=tower["patch_size"],
            layer_norm_eps=float(tower.get("layer_norm_eps") or 1e-6),
            grid_pinpoints=grid,
        )


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint: the language model and, unless it is language-only, its eyes."""

    language: LanguageConfig
    vision: VisionConfig | None

    @classmethod
    def from_json(cls, raw: dict[str, Any], vocab_rows: int | None = None, source: str = "config.json") -> ModelConfig:
        """Parse the released ``config.json`` fields. A config that names no vision tower is language-only."""
        has_vision = raw.get("mm_vision_tower") is not None or raw.get("vision_config") is not None
        return cls(
            language=LanguageConfig.from_json(raw, vocab_rows, source),
            vision=VisionConfig.from_json(raw, source) if has_vision else None,
        )


Loop = Literal["uncached", "cached"]
LOOPS: tuple[Loop, ...] = get_args(Loop)
"""The denoising loops: the whole sequence at every step, or the answer's rows with the prompt's keys and values kept
(LaViDa's prefix mode)."""

MergeSchedule = Literal["adaptive", "fixed", "none"]
SelectionPolicy = Literal["decider", "random", "uniform", "fastv"]
Aggregation = Literal["sum", "mean"]
MergedPositions = Literal["compact", "original"]
Remerge = Literal["every-step", "on-change", "per-block"]
StepSchedule = Literal["none", "shift", "cosine", "logit_normal", "linear"]
Remasking = Literal["low_confidence", "margin", "entropy", "random"]

Certainty = Literal["margin", "entropy"]
"""What positions may be ranked by that follows from the whole distribution: the difference of the two largest
probabilities, or the negative entropy."""
CERTAINTIES: tuple[Certainty, ...] = get_args(Certainty)


def remasking_mode(name: str) -> Remasking:
    """A remasking mode by name, in the release's spelling of entropy ("entrophy") too."""
    return "entropy" if name == "entrophy" else name  # type: ignore[return-value]


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
        _check_choice("aggregation", self.aggregate, Aggregation)
        _check_choice("positions after merging", self.positions, MergedPositions)

    def check_layer(self, n_layers: int) -> None:
        """Refuse a merge layer outside a model of ``n_layers`` blocks."""
        if not 0 <= self.layer < n_layers:
            raise D3tomError(
                f"merge layer {self.layer} is outside this model: it has {n_layers} layers, so --layer takes "
                f"0 to {n_layers - 1}. The paper merges early (2 or 3)."
            )

    def check_cached(self) -> None:
        """Refuse what the loop with a KV cache does not do."""
        if (self.select, self.aggregate, self.positions) != ("decider", "sum", "compact"):
            raise D3tomError(
                "The KV-cache loop merges with select decider, aggregate sum and compact positions only. Found select "
                f"{self.select}, aggregate {self.aggregate}, {self.positions} positions; run these without the cache."
            )

    def in_loop(self, kv_cache: bool) -> MergeConfig:
        """What of this configuration holds in the loop with a KV cache, or in the one without."""
        if not kv_cache:
            return replace(self, cache=CacheMergeConfig())
        if self.schedule == "adaptive" and not self.cache.adaptive:
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
    step_ratio: float | None = None
    """Steps per block as a share of the block's length; None: one step per token."""
    schedule: StepSchedule = "none"
    """How many tokens each step commits."""
    shift: float = 3.0
    """Parameter of the "shift" schedule. The release's default is 3; the LaViDa paper finds 1/3 better."""
    remasking: Remasking = "low_confidence"
    temperature: float = 0.0
    """0 takes the most likely token; above, Gumbel-max sampling."""
    seed: int = 0
    """Row b of a batch draws its noise from ``seed + b`` alone, so rows do not depend on one another."""

    def __post_init__(self) -> None:
        _check_choice("step schedule", self.schedule, StepSchedule)
        _check_choice("remasking", self.remasking, Remasking)
        problems = []
        for name in ("gen_length", "block_length", "seed"):
            value = getattr(self, name)
            if type(value) is not int and not (name == "block_length" and value is None):
                problems.append(f"{name} is {value!r}, expected an integer")
        for name in ("step_ratio", "shift", "temperature"):
            value = getattr(self, name)
            finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not finite and not (name == "step_ratio" and value is None):
                problems.append(f"{name} is {value!r}, expected a finite number")
        if problems:
            raise D3tomError(f"These generation settings cannot work: {'; '.join(problems)}.")
        if self.gen_length < 1:
            problems.append(f"answer length is {self.gen_length}, expected at least 1")
        elif self.block < 1 or self.gen_length % self.block:
            problems.append(f"block length {self.block} does not divide the answer length {self.gen_length}")
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

    @property
    def block(self) -> int:
        """Tokens per block."""
        return self.gen_length if self.block_length is None else self.block_length

    @property
    def steps_per_block(self) -> int:
        """T: one step per token of the block, times ``step_ratio`` (truncated)."""
        return self.block if self.step_ratio is None else int(self.block * self.step_ratio)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token and its probability are all that a step needs."""
        return self.temperature == 0 and self.remasking == "low_confidence"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
