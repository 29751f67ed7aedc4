"""The modules of `measure_clips.py`: the tensors that a model quantizes, measurements of their clips, tables, plots."""
