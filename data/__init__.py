"""Captioned images, whatever their source: the emoji that ship with this repository, built-in scenes with exact
answers, folders, WebDataset shards, COCO. `sources.open_data` opens what `--data` names; `pairs.py` reads one image and
caption as the web has them.
"""
