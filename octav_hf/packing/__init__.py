"""Weights stored as integers: packing a model, the names of its tensors in files, and the record of the files."""
