"""What of a model is quantized: as its modules say, and as a forward pass shows."""
