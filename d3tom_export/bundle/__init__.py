"""What a build writes and a run reads: the folder, its manifest, and how it comes into place."""

from d3tom_export.front import lazily

__getattr__ = lazily(__name__, {"load_bundle": "folder"})
