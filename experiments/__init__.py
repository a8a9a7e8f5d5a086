"""What stands above the commands: ablations, a probe of the experts and the latent space, nearest training pictures,
benchmarks, and how the small CLIP of the built-in scenes was trained. Run one as `python -m experiments.NAME`.
"""
