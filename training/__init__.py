"""What a run needs beside the networks and losses: one step (`step.py`) and the loop around it (`loop.py`), growth by a
reference FID, the run's folder, and who watches: `guard.py` the losses, `overfitting.py` the discriminator. `graphs.py`
launches a step as one where a GPU would wait for the host, `plan.py` computes what a run would take, and
`small_clip.py` trains a CLIP where no weights are at hand.
"""
