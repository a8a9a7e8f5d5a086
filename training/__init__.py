"""What a run needs beside the networks and losses: one step, growth by a reference FID, the run's folder, a guard.
`graphs.py` launches a step as one where a GPU would wait for the host, `plan.py` computes what a run would take, and
`small_clip.py` trains a CLIP where no weights are at hand.
"""
