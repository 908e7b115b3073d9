"""The Python API: what ``import d3tom_export as d3`` shows."""
