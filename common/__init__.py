"""Leaves that everything may use: the manners of a command (`cli.py`), torch.distributed (`distributed.py`), writing of
files, whole or not at all (`disk.py`), and CLIP's tokenizer (`tokenizer.py`).
"""
