"""The dtypes of engines' tensors (engines/record.py spells them) in NumPy, which has no bfloat16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TENSORRT_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
TENSORRT_NAMES |= {"int64": "INT64", "int32": "INT32", "bool": "BOOL"}
"""Members of TensorRT's ``DataType``."""


def to_engine(array: NDArray, dtype: str) -> NDArray:
    """``array`` as the bytes an engine reads; bfloat16, which NumPy lacks, as uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype=dtype)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # A NaN keeps being one: rounding could carry its last bit away.
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_engine(array: NDArray, dtype: str) -> NDArray:
    """A copy of what an engine wrote: floats as float32, whatever their precision, integers as int64."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("float16", "float32"):
        return array.astype(np.float32)
    return array.astype(np.int64) if dtype == "int32" else array.copy()


def host_dtype(dtype: str) -> str:
    """The NumPy dtype whose bytes are those of an engine's ``dtype``."""
    return "uint16" if dtype == "bfloat16" else dtype
