"""Fuzz targets for what strangers write. ``python -m tests.fuzz`` runs them; so does the suite, briefly."""
