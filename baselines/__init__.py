"""Other systems to hold Aurora against, each whole in one file: StyleGAN-T, LadaGAN, whose attention has linear cost,
and Muse, which fills in masked tokens. `shared.py` is what they share, and their command.
"""
