"""Captioned images, whatever their source: `sources.py` (what a source is, what `--data` names, the workers), folders
(`folder.py`), WebDataset shards and the built-in emoji (`shards.py`), COCO. `pairs.py` reads one image and caption as
the web has them, `svg.py` a picture of vectors.
"""
