"""Clips that no longer follow the data, of activations and of weights."""
