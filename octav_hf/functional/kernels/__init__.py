"""Compiled kernels: clips in C++ and Triton, elementwise functions in Inductor, Triton and C++."""
