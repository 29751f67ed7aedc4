"""The console command ``octav-hf``: pack, unpack, export, inspect and push checkpoints, and write their cards."""

from .command import main

__all__ = ["main"]
