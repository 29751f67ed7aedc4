"""What quantization costs a model, module by module, and which widths lose least."""
