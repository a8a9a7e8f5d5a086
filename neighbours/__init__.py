"""Other text-to-image GANs to hold Aurora against, each with its networks, losses, step and sampling in one file:
StyleGAN-T (`stylegan_t.py`), and LadaGAN (`ladagan.py`), whose attention has linear cost. `system.py` is what they
share, and `features.py` holds the frozen networks that a discriminator looks through.
"""
