"""Experiments with whole models: ablations, a probe of the experts, nearest training pictures, benchmarks, a comparison
with the baselines. Run one as `python -m experiments.NAME`.
"""
