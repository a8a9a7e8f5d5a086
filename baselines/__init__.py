"""Other systems to hold Aurora against, each whole in one file: StyleGAN-T, LadaGAN, whose attention has linear cost,
and Muse, which fills in masked tokens. `command.py` trains and samples them, and `system.py` is what the GANs share.
"""
