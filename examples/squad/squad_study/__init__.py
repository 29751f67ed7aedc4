"""The modules of `study.py`: its cells, the file with its results, and the tables and plots made from it."""
