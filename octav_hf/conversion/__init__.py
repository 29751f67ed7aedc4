"""A float model becomes a quantized one, and a float one again: what to convert, and converting it."""
