"""Triton kernels, one a file, each beside its launcher and its gradient. Triton is imported nowhere else."""
