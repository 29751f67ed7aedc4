"""Tests of octav_hf: the tree mirrors the package; `twins` and `bert_twin` are its independent references."""
