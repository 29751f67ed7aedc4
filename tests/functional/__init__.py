"""Tests of octav_hf.functional."""
