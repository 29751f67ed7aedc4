"""What is quantized in a model: a report from its modules, and a check by a forward pass."""
