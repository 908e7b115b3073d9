"""The package's version, for modules below its front: those that the front names cannot import it from there."""

__version__ = "0.1.0"
