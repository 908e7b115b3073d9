"""A model whose layers read their weights when they run: for models larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

ReadTensors = Callable[[list[str]], Iterable[tuple[str, Tensor]]]
"""Gives the tensors of the given names, in any order."""


def stream_weights(model: nn.Module, read: ReadTensors, dtype: torch.dtype) -> None:
    """Let each innermost module of ``model`` read its weights, as ``dtype``, before it runs and drop them afterwards.

    In between they are on the meta device. Parameters of other modules, which are never called for them, are few and
    small (``image_newline``): they are read at once.
    """
    for path, module in model.named_modules():
        names = {f"{path}.{name}": name for name, _ in module.named_parameters(recurse=False)}
        if not names:
            continue
        if any(module.children()):
            _fill(module, names, read, dtype)
            continue
        _empty(module, names, dtype)
        module.register_forward_pre_hook(lambda module, _, names=names: _fill(module, names, read, dtype))
        module.register_forward_hook(lambda module, *_, names=names: _empty(module, names, dtype))


def _fill(module: nn.Module, names: dict[str, str], read: ReadTensors, dtype: torch.dtype) -> None:
    for stored, tensor in read(list(names)):
        setattr(module, names[stored], nn.Parameter(tensor.to(dtype), requires_grad=False))


def _empty(module: nn.Module, names: dict[str, str], dtype: torch.dtype) -> None:
    for name in names.values():
        parameter: Any = getattr(module, name)
        hollow = torch.empty(parameter.shape, dtype=dtype, device="meta")
        setattr(module, name, nn.Parameter(hollow, requires_grad=False))
