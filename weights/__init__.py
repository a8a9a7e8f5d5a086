"""From a file to a network and back: the file of a generator (`generator_file.py`), the state of a run
(`checkpoint.py`), the authors' weights (`official.py`), and a package's EfficientNet (`efficientnet.py`).
"""
