"""The parts of `measure_clips.py`: the tensors a model quantizes, measurements of their clips, tables and plots."""
