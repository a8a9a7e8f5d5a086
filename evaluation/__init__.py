"""How good generated images are. `metrics.py` has the formulas, `extractors.py` the frozen networks, `features.py` runs
these on real and generated images, `curve.py` plots. `judge.py` reads the built-in scenes; `emoji.py` has what only the
emoji allow.
"""
