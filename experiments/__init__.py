"""What stands above the commands: ablations, a probe of the experts and the latent space, nearest training pictures,
benchmarks, and a comparison with the baselines. Run one as `python -m experiments.NAME`.
"""
