"""From a file to a network and back: our own files and the states of runs (`checkpoint.py`), the same in half precision
(`half.py`), the authors' weights (`official.py`, `renaming.py`), a package's EfficientNet (`efficientnet.py`), and a
small CLIP without its image tower (`text_tower.py`).
"""
