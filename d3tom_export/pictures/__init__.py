"""Pictures in: what a model sees of them, and where it stands in a prompt."""

from d3tom_export.front import lazily

__getattr__ = lazily(__name__, {"open_picture": "views"})
