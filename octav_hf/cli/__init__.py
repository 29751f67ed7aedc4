"""The console command ``octav-hf``: convert, export, inspect, analyse and push checkpoints, and write their cards."""

from .command import main

__all__ = ["main"]
