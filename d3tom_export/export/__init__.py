"""A checkpoint in, a bundle out."""
