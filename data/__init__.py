"""Captioned images: `sources.py` (a Source, what `--data` names, the workers), folders (`folder.py`), WebDataset shards
and the built-in emoji (`shards.py`), COCO. `pairs.py` reads one image and its caption, `svg.py` renders an SVG.
"""
