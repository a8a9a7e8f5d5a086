"""Reads and writes weights: generator files (`generator_file.py`), checkpoints (`checkpoint.py`), the authors' weights
(`official.py`) and EfficientNet (`efficientnet.py`).
"""
