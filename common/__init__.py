"""Leaves that everything may use: the manners of a command (`cli.py`), torch.distributed (`distributed.py`), signals
that ask a run to stop (`stopping.py`), and writing of files, whole or not at all (`disk.py`).
"""
