"""Eager models of an opened checkpoint: without weights, with hollow ones, or with its own."""

from __future__ import annotations

import torch
from torch import nn

from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.rounding import round_input
from d3tom_export.model.streaming import stream_weights
from d3tom_export.quantize.stored import read_input_scale


def empty_model(checkpoint: Checkpoint) -> Lavida:
    """The checkpoint's model on the meta device; tensors and config were held against each other when it was opened."""
    with torch.device("meta"):
        model = Lavida(checkpoint.config, checkpoint.vision_layers)
    return model.eval().requires_grad_(False)


def hollow_model(checkpoint: Checkpoint) -> Lavida:
    """The checkpoint's model with parameters of the right shapes and no content, for tracing: 4 bytes each.

    Real CPU tensors of one element, expanded: the exporter asks for shapes and strides and never reads them.
    """
    model = empty_model(checkpoint)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False)
            setattr(module, name, hollow)
    _make_buffers(model)
    return model


def load_model(checkpoint: Checkpoint, dtype: str = "float32", *, streamed: bool = False) -> Lavida:
    """The eager model with its weights in ``dtype`` (a torch dtype's name), on the CPU.

    Products whose input a bundle's graphs round do so here as well.

    ``streamed`` leaves the weights in their files: every layer maps and converts its own when it runs and lets them go
    after it, so that memory holds one layer's, and a step takes as long as reading the whole model.
    """
    model = empty_model(checkpoint)
    target = getattr(torch, dtype)
    if streamed:
        stream_weights(model, checkpoint.read, target)
    else:
        state = {name: tensor.to(target) for name, tensor in checkpoint.read(list(model.state_dict()))}
        model.load_state_dict(state, assign=True)
    _make_buffers(model)
    for name, tensor in checkpoint.quantized.items():
        scale = read_input_scale(tensor)
        if scale is not None:
            round_input(model.get_submodule(name.removesuffix(".weight")), scale)
    return model


def _make_buffers(model: nn.Module) -> None:
    """Make what no checkpoint stores (the tower's position ids), which was left on the meta device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
