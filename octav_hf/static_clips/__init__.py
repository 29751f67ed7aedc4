"""Static clips of activations and weights."""
