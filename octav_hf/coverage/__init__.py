"""What is quantized in a model: a report on its modules, and a check that runs a forward pass."""
