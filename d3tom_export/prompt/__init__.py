"""Questions and pictures in, text out."""
