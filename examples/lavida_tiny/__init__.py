"""How the bundled lavida-tiny model was made: run ``python -m examples.lavida_tiny.train`` in the repository root."""
