"""What stands above the commands: ablations, a probe of the experts, nearest training pictures, benchmarks, and a
comparison with the baselines. Run one as `python -m experiments.NAME`.
"""
