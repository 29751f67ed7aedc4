"""Compiled code behind the functions: C++ and Triton for clips, Inductor for elementwise loops."""
