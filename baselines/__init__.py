"""Three systems to compare with Aurora: StyleGAN-T; LadaGAN, whose attention has linear cost; and Muse, which fills in
masked tokens. Each is one file; `shared.py` contains what they share, and their command.
"""
