"""What a bundle does with a few pictures, as one HTML page: gathered, drawn, written."""
