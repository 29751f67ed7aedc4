"""Checkpoints as others see them: folders, repositories on the Hub, model cards."""
