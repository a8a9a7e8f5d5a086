"""Triton kernels, one family a file, with their launches and gradients. No other folder imports Triton."""
