"""A ``config.json`` to configuration, by a family's keys; every problem found is reported at once."""

from __future__ import annotations

import re
from typing import Any

from d3tom_export.config import LanguageConfig, ModelConfig, VisionConfig
from d3tom_export.errors import D3tomError
from d3tom_export.families.family import Family, LanguageKeys, Raw, VisionKeys
from d3tom_export.trust.fields import LARGEST_SIZE, canvas_sizes, fixed_field_problems, number_problems, shown

_MOST_LAYERS = 1024
"""Of a transformer. The deepest published have a few hundred."""

_LONGEST_SEQUENCE = 2**24
"""Tokens. Beyond, float32, in which rotary angles are computed, has no whole number for every position."""

_MOST_IDS = 64
"""Of a list of token ids in a config."""

_INTEGERS = {
    **dict.fromkeys(("d_model", "n_heads", "n_kv_heads", "mlp_hidden_size"), LARGEST_SIZE),
    **dict.fromkeys(("vocab_size", "embedding_size"), LARGEST_SIZE),
    "n_layers": _MOST_LAYERS,
    **dict.fromkeys(("max_sequence_length", "max_prompt_length"), _LONGEST_SEQUENCE),
}
_FLOATS = {"rope_theta": (1.0, 1e12), "rms_norm_eps": (1e-30, 1.0)}

SIGLIP_SO400M_PATCH14_384: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
"""Geometry of google/siglip-so400m-patch14-384 and of its successor siglip2 (their published config.json), which
released checkpoints name by path without repeating it; a ``vision_config`` in config.json takes its place."""


def read_model(family: Family, raw: Raw, vocab_rows: int | None, source: str) -> ModelConfig:
    """The model that ``raw``, a ``config.json`` of ``family``, describes.

    ``vocab_rows`` clips the embedding table, and the head where the original does (None: all stored rows are used);
    ``source`` is what messages call the file. A config that names no vision tower is language-only. Raises
    :class:`D3tomError`.
    """
    language = _read_language(family, raw, vocab_rows, source)
    return ModelConfig(family.name, language, _read_vision(family, raw, source) if has_eyes(family, raw) else None)


def has_eyes(family: Family, raw: Raw) -> bool:
    """Whether the model that ``raw`` describes has a vision tower."""
    if family.vision is None:
        return False
    supplied = family.vision.default_tower is not None and raw.get("mm_projector_type") is not None
    return supplied or raw.get("mm_vision_tower") is not None or raw.get("vision_config") is not None


def _reject(family: Family, source: str, problems: list[str]) -> None:
    if problems:
        raise D3tomError(
            f"{source} is a {family.title} model's by its name and keys, but not one that this tool can build: "
            f"{'; '.join(problems)}. Compare it with the config.json that {family.title} was released with."
        )


def _ids(raw: Raw, key: str, problems: list[str]) -> tuple[int, ...]:
    """Token ids under ``key``: one, a list, or none."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token <= LARGEST_SIZE for token in ids):
        problems.append(f"{key} is {shown(value)}, expected a token id")
        return ()
    if len(ids) > _MOST_IDS:
        problems.append(f"{key} has {len(ids):,} ids, at most {_MOST_IDS} are supported")
    return tuple(ids)


def _read_language(family: Family, raw: Raw, vocab_rows: int | None, source: str) -> LanguageConfig:
    said: LanguageKeys = family.language
    keys = said.keys
    problems = [f"required field {keys[name]} is missing" for name in said.required if raw.get(keys[name]) is None]
    problems += [f"required field {key} is missing" for key in said.said if raw.get(key) is None]
    problems += fixed_field_problems(raw, said.fixed)
    problems += number_problems(
        raw,
        integers={keys[name]: most for name, most in _INTEGERS.items() if name in keys},
        floats={keys[name]: range_ for name, range_ in _FLOATS.items() if name in keys},
    )
    for name in ("include_qkv_bias", "multi_query_attention", "tie_word_embeddings"):
        key = keys.get(name)
        if key is not None and raw.get(key) is not None and type(raw[key]) is not bool:
            problems.append(f"{key} is {shown(raw[key])}, expected true or false")
    if isinstance(raw.get(keys["mask_token_id"]), list):
        problems.append(f"{keys['mask_token_id']} is {shown(raw[keys['mask_token_id']])}, expected a token id")
    _ids(raw, keys["mask_token_id"], problems)
    stops = _ids(raw, keys["eos_token_id"], problems)
    banned = _ids(raw, keys["banned_token_ids"], problems) if "banned_token_ids" in keys else ()
    _reject(family, source, problems)

    def value(name: str) -> Any:
        found = raw.get(keys[name]) if name in keys else None
        return said.constants.get(name) if found is None else found

    heads, width = value("n_heads"), value("d_model")
    kv_heads = value("n_kv_heads") or (1 if value("multi_query_attention") else heads)
    mask = value("mask_token_id")
    if "banned_token_ids" not in keys or raw.get(keys["banned_token_ids"]) is None:
        banned = tuple(said.constants.get("banned_token_ids", ()))
    if width % heads or (width // heads) % 2:
        problems.append(f"{keys['d_model']} {width} does not split into {heads} heads of even size")
    if heads % kv_heads:
        problems.append(f"{keys['n_heads']} {heads} is not a multiple of {keys['n_kv_heads']} {kv_heads}")
    embedding_size = value("embedding_size") or value("vocab_size")
    if value("vocab_size") > embedding_size:
        problems.append(
            f"{keys['vocab_size']} {value('vocab_size'):,} exceeds {keys['embedding_size']} {embedding_size:,}"
        )
    rows = embedding_size if vocab_rows is None else min(vocab_rows, embedding_size)
    if not 0 <= mask < rows:
        problems.append(
            f"{keys['mask_token_id']} {mask} lies outside the {rows} usable vocabulary rows (rows beyond the "
            "tokenizer's length are cut off unless --full-vocabulary keeps them)"
        )
    outside = [token for token in banned if token >= rows]
    if outside:
        key = keys.get("banned_token_ids", "banned token ids")
        problems.append(f"{key} holds {outside[0]}, which lies outside the {rows} usable vocabulary rows")
    _reject(family, source, problems)
    # transformers' default is true, and the original's resizing goes by it: see LanguageConfig.head_rows
    tied = raw.get(keys["tie_word_embeddings"], True) if "tie_word_embeddings" in keys else False
    return LanguageConfig(
        d_model=width,
        n_layers=value("n_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        mlp_hidden_size=value("mlp_hidden_size"),
        vocab_rows=rows,
        head_rows=embedding_size if tied else rows,
        embedding_size=embedding_size,
        mask_token_id=mask,
        eos_token_ids=stops,
        rope_theta=float(value("rope_theta")),
        rms_norm_eps=float(value("rms_norm_eps")),
        max_sequence_length=value("max_sequence_length"),
        include_qkv_bias=bool(value("include_qkv_bias")),
        max_prompt_length=value("max_prompt_length"),
        banned_token_ids=tuple(sorted(set(banned))),
        row_shift=said.row_shift,
    )


def _read_vision(family: Family, raw: Raw, source: str) -> VisionConfig:
    said: VisionKeys | None = family.vision
    assert said is not None
    problems = [f"required field {name} is missing" for name in said.required if raw.get(name) is None]
    problems += fixed_field_problems(raw, said.fixed)
    aspect = raw.get("image_aspect_ratio")
    packed = re.fullmatch(said.aspect, aspect) if isinstance(aspect, str) else None
    if packed is None and aspect is not None:
        problems.append(
            f"image_aspect_ratio is {shown(aspect)}, supported: {said.aspect.replace('([1-9][0-9]?)', 'N')}"
        )
    tower = raw.get("vision_config")
    if tower is None:
        name = raw.get("mm_vision_tower")
        known = isinstance(name, str) and any(each in name for each in said.towers)
        if not known and said.default_tower is None:
            problems.append(
                f"mm_vision_tower is {shown(name)} and no vision_config gives its geometry "
                f"(known without one: {' and '.join(said.towers)})"
            )
        tower = SIGLIP_SO400M_PATCH14_384
    elif not isinstance(tower, dict):
        problems.append(f"vision_config is {shown(tower)}, expected an object with the tower's geometry")
        _reject(family, source, problems)
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
    _reject(family, source, problems)
    side = tower["image_size"]
    pinpoints = _pinpoints(raw.get("image_grid_pinpoints"), side)
    if not pinpoints:
        problems.append("required field image_grid_pinpoints is missing")
        _reject(family, source, problems)
    if tower["patch_size"] > side:
        problems.append(f"vision_config.patch_size {tower['patch_size']:,} exceeds image_size {side:,}")
    grid, canvas_problems = canvas_sizes("image_grid_pinpoints", pinpoints, side)
    problems += canvas_problems
    if tower["hidden_size"] % tower["num_attention_heads"]:
        problems.append(
            f"vision_config.hidden_size {tower['hidden_size']} does not split into {tower['num_attention_heads']} heads"
        )
    _reject(family, source, problems)
    return VisionConfig(
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        num_hidden_layers=tower["num_hidden_layers"],
        num_attention_heads=tower["num_attention_heads"],
        image_size=side,
        patch_size=tower["patch_size"],
        layer_norm_eps=float(tower.get("layer_norm_eps") or 1e-6),
        grid_pinpoints=grid,
        pooled=said.pooled,
        max_views=int(packed[1]) if packed is not None and packed.groups() else None,
        pads_several=said.pads_several,
    )


def _pinpoints(given: object, side: int) -> object:
    """Canvas sizes as a list; LLaVA's code also takes the corners of a grid, as "(1x1),...,(6x6)", in views."""
    if not isinstance(given, str):
        return given
    corners = re.findall(r"\(([1-9][0-9]?)x([1-9][0-9]?)\)", given)
    if not corners:
        return given
    (first_width, first_height), (last_width, last_height) = (map(int, corners[end]) for end in (0, -1))
    columns, rows = range(first_width, last_width + 1), range(first_height, last_height + 1)
    return [[side * column, side * row] for column in columns for row in rows]
