"""Leaves that everything may use: the manners of a command (`cli.py`), and torch.distributed (`distributed.py`)."""
