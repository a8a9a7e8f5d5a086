"""From a prompt to pictures: text and noise → w (`latent.py`), lists of frames to look at (`views.py`), labelled grids
and animations (`pictures.py`), and what is computed once before sampling (`inference.py`).
"""
