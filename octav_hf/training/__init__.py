"""Help for training: distillation, reconstruction, errors for NaN, and complete checkpoints."""
