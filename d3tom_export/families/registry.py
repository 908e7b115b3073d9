"""All families, and which of them a folder's model is of."""

from __future__ import annotations

from collections.abc import Mapping

from d3tom_export.config import CONFIG_FILE, ModelConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.families import lavida_dream, lavida_llada, llada, llada_v
from d3tom_export.families.family import Family, Raw
from d3tom_export.families.foreign import refuse_foreign, refuse_quantized, told_names
from d3tom_export.families.reading import read_model

FAMILIES: dict[str, Family] = {
    family.name: family for family in (lavida_dream.FAMILY, llada_v.FAMILY, lavida_llada.FAMILY, llada.FAMILY)
}
"""By name, in the order in which they are asked whether a model is theirs."""

RELEASED = lavida_llada.FAMILY
"""The one that D3ToM was released for. Recorded runs that name no family are of it."""


def family_of(config: ModelConfig) -> Family:
    """The family of a model whose config was read."""
    return FAMILIES[config.family]


def recognise(raw: Raw, source: str = CONFIG_FILE) -> Family:
    """The family that ``raw``, a ``config.json``, is of. Raises :class:`D3tomError` where it is of none.

    Models that are known and not built are named for what they are, before any family takes them for its own.
    """
    refuse_foreign(raw, source)
    refuse_quantized(raw, source)
    for family in FAMILIES.values():
        if family.recognises(raw):
            return family
    told = told_names(raw) or "nothing that names one"
    raise D3tomError(
        f"{source} is of another architecture than this tool builds: it says {told}. "
        f"Known are {listing(family.title for family in FAMILIES.values())}."
    )


def read_config(
    raw: Raw, vocab_rows: int | None = None, source: str = CONFIG_FILE, family: str | None = None
) -> ModelConfig:
    """The model that ``raw``, a ``config.json``, describes; of ``family``, or of the one that is recognised."""
    known = recognise(raw, source) if family is None else FAMILIES[family]
    return read_model(known, raw, vocab_rows, source)


def geometries() -> Mapping[str, Raw]:
    """Every family's geometries by name."""
    return {name: raw for family in FAMILIES.values() for name, raw in family.geometries.items()}
