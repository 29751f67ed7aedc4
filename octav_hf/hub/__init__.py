"""Checkpoint folders, repositories on the Hub and model cards."""
