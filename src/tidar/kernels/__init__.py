"""Triton kernels of the decode step. Every kernel has its eager twin in the same file; tests hold them together."""
