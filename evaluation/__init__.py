"""How good generated images are. `metrics.py` has the formulas, `extractors.py` the frozen networks, `features.py` runs
these on real and generated images. `emoji.py` has what only the emoji allow.
"""
