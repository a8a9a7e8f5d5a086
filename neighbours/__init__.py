"""Other text-to-image systems to hold Aurora against, each whole in one file: networks, losses, one training step and
sampling. StyleGAN-T (`stylegan_t.py`) is the one that Aurora's paper names first; LadaGAN (`ladagan.py`) is a small one
with attention of linear cost.
"""
