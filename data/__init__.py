"""Captioned images: `sources.py` (a Source, what `--data` names, the workers), folders (`folder.py`), WebDataset shards
(`shards.py`), the built-in emoji (`emoji.py`), COCO (`coco.py`). `pairs.py` reads one image and its caption, `svg.py`
renders an SVG.
"""
