"""What the tests of checkpoint folders take apart and put together otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def state(checkpoint_folder: Path) -> dict[str, torch.Tensor]:
    """The synthetic checkpoint's tensors by their stored names; read only."""
    return {
        name: tensor for path in checkpoint_folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
