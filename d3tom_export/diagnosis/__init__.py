"""Where a backend departs from PyTorch: the first stage, then the first module within it."""
