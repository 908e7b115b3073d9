"""All families, and which of them a folder's model is of."""

from __future__ import annotations

from collections.abc import Mapping

from d3tom_export.config import CONFIG_FILE, ModelConfig
from d3tom_export.errors import D3tomError, listing
from d3tom_export.families import lavida_dream, lavida_llada, llada, llada_v
from d3tom_export.families.family import Family, Raw
from d3tom_export.families.reading import read_model
from d3tom_export.trust.fields import shown

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
    """The family that ``raw``, a ``config.json``, is of. Raises :class:`D3tomError` where it is of none."""
    for family in FAMILIES.values():
        if family.recognises(raw):
            return family
    named = {key: raw.get(key) for key in ("architectures", "model_type")}
    told = ", ".join(f"{key} {shown(value)}" for key, value in named.items() if value is not None)
    raise D3tomError(
        f"{source} is of another architecture than this tool builds: it says {told or 'nothing that names one'}. "
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
