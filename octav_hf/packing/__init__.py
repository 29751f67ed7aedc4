"""Packed models: weights stored as integers, the names of their tensors, and the record in their files."""
