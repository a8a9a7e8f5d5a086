"""What everything may import: command line helpers (`cli.py`), torch.distributed (`distributed.py`), signals that ask a
run to stop (`stopping.py`), and files that are written whole or not at all (`disk.py`).
"""
