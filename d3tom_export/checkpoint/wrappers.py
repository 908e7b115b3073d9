"""What stands before the tensors' names of a model that was saved from within something: found, and left out.

DistributedDataParallel, torch.compile, PEFT and whoever keeps a model in a field of a class of theirs put a prefix
before every name. Where all names have it, it says nothing and is left out; where some have, nobody can tell what the
others are, and the folder is refused. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from d3tom_export.errors import D3tomError, printable
from d3tom_export.families.registry import FAMILIES

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "base_model.")
"""What DistributedDataParallel, torch.compile and PEFT put before every name."""

_FIELD = "model."
"""What a class of somebody's own puts there whose field the model is, as Lightning's do. Our names begin so too."""

_INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_flat_param")
"""Of wrappers around single layers, within names: FSDP's, those of activation checkpointing and torch.compile."""

_TABLE = "model.transformer.wte.weight"


def _tables() -> set[str]:
    """The embedding table's name in each family: a model without one is none."""
    return {family.stored_name(_TABLE) for family in FAMILIES.values()}


def wrapping(names: Collection[str]) -> str:
    """What wrappers put before every one of ``names``; empty where they did not."""
    tables, prefix, known = _tables(), "", ""
    while names:
        if any(prefix + table in names for table in tables):
            return prefix
        found = next(
            (each for each in (*WRAPPERS, _FIELD) if all(name.startswith(prefix + each) for name in names)), ""
        )
        if not found:
            break
        prefix += found
        known = prefix if found in WRAPPERS else known
    return known  # without a table to go by, `model.` is a part of the names


def check_wrapping(folder: Path, names: Collection[str]) -> None:
    """Refuse names that only some wrapper put a prefix before, or one that is not known.

    Raises :class:`D3tomError` with the prefix, and how to save the model itself.
    """
    prefix = wrapping(names)
    bare = [name[len(prefix) :] for name in names]
    for each in WRAPPERS:
        count = sum(name.startswith(each) for name in bare)
        if count:
            example = next(name for name in bare if not name.startswith(each))
            raise _refusal(
                folder,
                f"{count:,} of {len(bare):,} tensors' names begin with the prefix {prefix}{each}, and the others do "
                f"not, such as {printable(example, 120)}",
            )
    for each in _INSIDE:
        inside = next((name for name in bare if each in name), None)
        if inside is not None:
            raise _refusal(
                folder, f"wrappers around its layers left {each} within names, as in {printable(inside, 120)}"
            )
    odd = _before_table(bare)
    if odd:
        raise _refusal(
            folder, f"tensors' names begin with the prefix {printable(odd, 80)}, which is of no wrapper that is known"
        )
    fielded = sorted(table for table in _tables() if table.startswith(_FIELD))
    lacking = next((table for table in fielded if table.removeprefix(_FIELD) in bare), None)
    if lacking is not None:
        raise _refusal(
            folder, f"tensors' names lack the prefix {_FIELD}: {lacking.removeprefix(_FIELD)} stands for {lacking}"
        )


def _before_table(bare: Iterable[str]) -> str:
    """What stands before the embedding table's own name, if there is one and it does not stand alone."""
    return next(
        (
            name.removesuffix(table)
            for name in bare
            for table in _tables()
            if name.endswith(f".{table}") and name != table
        ),
        "",
    )


def _refusal(folder: Path, what: str) -> D3tomError:
    return D3tomError(
        f"The weights in {folder} were saved from within something else: {what}. Save the model itself, not what it "
        "was wrapped in (its save_pretrained; or the state dict of the innermost model), or rename the tensors."
    )
