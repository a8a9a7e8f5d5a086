"""How good generated images are. `metrics.py` has the formulas, `extractors.py` the frozen networks, and `features.py`
applies them to real and generated images. `emoji.py` measures what only the emoji allow, `enlarging.py` compares second
stages.
"""
