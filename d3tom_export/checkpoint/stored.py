"""The tensors that a folder stores: safetensors in one file or in shards, by name, headers first. No pickle."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import check_name, find_inside, is_there
from d3tom_export.trust.tensors import StoredTensor, open_stored, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


_MOST_SHARDS = 1000
"""Of a checkpoint. The largest published have 200."""

_MOST_TENSORS = 400_000
"""Of a checkpoint. The largest published, with hundreds of experts a layer, have 100,000."""

_LARGEST_ARRAY = 1 << 30
"""Bytes of a tensor that the host reads whole: vectors of the model's width, a few kB each."""


def read_array(tensor: StoredTensor) -> NDArray[np.float32]:
    """A stored tensor as float32, read without torch; for the few that the host needs.

    Raises :class:`D3tomError` where it is not one of floats, is huge, or its file changed since its header was read.
    """
    import numpy as np

    if tensor.dtype not in WEIGHT_DTYPES or tensor.length > _LARGEST_ARRAY:
        raise D3tomError(
            f"{tensor.file} holds a tensor of {tensor.length:,} bytes of {tensor.dtype} where a vector of F64, F32, "
            "F16 or BF16 is expected. Fetch the file again."
        )
    with open_stored(tensor) as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.length)
    if tensor.dtype == "BF16":
        array = from_bfloat16(np.frombuffer(raw, "<u2"))
    else:
        array = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.dtype]).astype(np.float32)
    return array.reshape(tensor.shape)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Numbers from their bits in bfloat16, which NumPy has no name for: the upper half of a float32's."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, checked against its index where it has one; every broken shard is named at once.

    As in transformers, one ``model.safetensors`` is taken before any index. Raises :class:`D3tomError` where an index
    whose shards are all there lies beside it: which of the two saves is meant, nobody can tell.
    """
    single, indexed = is_there(folder, SINGLE_FILE), is_there(folder, INDEX_FILE)
    if single:
        shards = set(_weight_map(folder).values()) if indexed else set()
        if shards - {SINGLE_FILE} and all(is_there(folder, shard) for shard in shards):
            raise D3tomError(
                f"{folder} holds two saves of a model: {SINGLE_FILE}, and {INDEX_FILE} with its shards "
                f"({listing(sorted(shards), 4)}). Remove the older one."
            )
        return read_header(folder / SINGLE_FILE, find_inside(folder, SINGLE_FILE))
    if not indexed:
        raise D3tomError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Name the folder that holds the weights."
        )
    weight_map = _weight_map(folder)
    headers: dict[str, dict[str, StoredTensor]] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        try:
            headers[shard] = read_header(folder / shard, find_inside(folder, shard))
        except D3tomError as error:
            problems.append(str(error))
        if sum(map(len, headers.values())) > _MOST_TENSORS:
            raise D3tomError(f"{folder} holds more than {_MOST_TENSORS:,} tensors, which no model has.")
    if problems:
        raise D3tomError(" ".join(problems[:8]) + (f" And {len(problems) - 8} more." if len(problems) > 8 else ""))
    strays = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    if strays:
        raise D3tomError(
            f"{folder / INDEX_FILE} promises tensors that its shards do not hold: {listing(strays)}. "
            "Index and shards come from different saves; fetch the folder again."
        )
    # The index decides; what a shard holds beyond it is still reported, as unexpected or unused.
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    tensors |= {name: headers[shard][name] for name, shard in weight_map.items()}
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as the folder's index has it: names of safetensors files beside the index.

    A bundle gets the shards under these names, beside files of its own, none of which ends in ``.safetensors`` but the
    one that a conversion writes in place of all shards.
    """
    path = folder / INDEX_FILE
    weight_map = read_json(find_inside(folder, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise D3tomError(f"{path} has no weight_map naming the shard of every tensor. Fetch the file again.")
    odd = {shown(shard): None for shard in weight_map.values() if not isinstance(shard, str)}
    if odd:
        raise D3tomError(f"{path} names shards that are no names of files: {listing(odd)}. Fetch the file again.")
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MOST_SHARDS:
        raise D3tomError(f"{path} names {len(shards):,} shards, at most {_MOST_SHARDS:,} are read. Fetch it again.")
    foreign = [shard for shard in shards if "/" in shard or "\\" in shard or shard in (".", "..")]
    if foreign:
        raise D3tomError(f"{path} names shards outside its folder: {listing(foreign)}. Expected bare file names.")
    spellings: dict[str, str] = {}
    for shard in shards:
        try:
            check_name(shard, suffix=".safetensors")
        except D3tomError as error:
            raise D3tomError(
                f"{path} names a shard that is none: {error} Rename the file and the index's entries."
            ) from None
        # File systems that fold case or compose letters would let one shard take another's place.
        other = spellings.setdefault(unicodedata.normalize("NFKC", shard).casefold(), shard)
        if other != shard:
            raise D3tomError(
                f"{path} names the shards {other!r} and {shard!r}, which some file systems take for the same file. "
                "Rename one of them, in the index too."
            )
    return weight_map
