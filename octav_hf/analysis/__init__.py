"""Which layer hurts: what quantization does to each operand, to the layers' outputs and to the model's."""
