"""Conversion of a float model to a quantized one and back: the plan, and carrying it out."""
