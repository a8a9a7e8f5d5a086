"""Captioned images, whatever their source: emoji (built in), folders (`folder.py`), WebDataset shards (`shards.py`,
their files by `members.py`), COCO. `sources.open_data` opens what `--data` names; `batches.py` is what
sources share; `pairs.py` reads one image and caption as the web has them.
"""
