"""From a file to a network and back: our own files and the states of runs (`checkpoint.py`), the authors' weights
(`official.py`, `renaming.py`), and a package's EfficientNet (`efficientnet.py`).
"""
