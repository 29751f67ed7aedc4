"""The modules of `run_squad.py`, from its arguments to its Trainer, and the words of `generate_squad.py`."""
