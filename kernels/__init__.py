"""Triton kernels, one family a file, with their launches and gradients. No other folder imports Triton.
experts.py and attention.py choose between these kernels and plain PyTorch.
"""
