"""Reads and writes weights: generator files (`generator_file.py`), checkpoints (`checkpoint.py`), the authors' weights
(`official.py`), EfficientNet (`efficientnet.py`) and the networks of the perceptual loss (`perceptual.py`).
"""
