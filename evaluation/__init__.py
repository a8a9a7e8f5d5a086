"""How good pictures are: distances between sets of them (`metrics.py`), the frozen networks that look at them
(`extractors.py`), and a classifier that reads the built-in scenes (`judge.py`).
"""
