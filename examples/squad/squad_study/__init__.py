"""The parts of `study.py`: its cells, the file of its results, and the tables and plots drawn from that."""
