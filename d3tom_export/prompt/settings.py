"""How one model is asked, and where its answers end: its family's way, or its checkpoint's own. No framework."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from d3tom_export.families.family import Family, Template


@dataclass(frozen=True)
class PromptSettings:
    """What a bundle's manifest stores under ``prompt``, so that asking takes neither a template engine nor a guess."""

    template: Template
    system: str | None
    """What the system turn says unless told otherwise; None: there is none."""
    bos: str | None
    """The token that begins a text, which decides whether the token after a picture is dropped; None: there is none."""
    end_tokens: tuple[str, ...]
    """Tokens that an answer is cut at when it is shown, beside the config's ``eos_token_ids``."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer while it is made; their ids are among the generation's settings."""
    drop_token_after_image: bool = True
    """Whether the token after a picture is dropped as the release does (:func:`d3tom_export.prompt.chat.tokenize`)."""

    @classmethod
    def of_family(cls, family: Family, *, drop_token_after_image: bool = True) -> PromptSettings:
        """The family's own way."""
        return cls(family.template, family.system, family.bos, family.end_tokens, family.stop, drop_token_after_image)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> PromptSettings:
        template = Template(**raw["template"] | {"strips": tuple(raw["template"]["strips"])})
        lists = {name: tuple(raw[name]) for name in ("end_tokens", "stop")}
        return cls(**raw | lists | {"template": template})
