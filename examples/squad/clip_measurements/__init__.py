"""What `measure_clips.py` measures of the clips of a tensor, and the tables and plots drawn from that."""
