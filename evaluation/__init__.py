"""How good generated images are. `metrics.py` has the formulas, `extractors.py` the frozen networks, and `features.py`
runs these on real and generated images, and measures all. `emoji.py` has what only the emoji allow, `enlarging.py`
compares second stages.
"""
