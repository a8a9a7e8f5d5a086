"""What a run needs around Aurora's step (`step.py`) and its growth (`growth.py`), which stand at the root: the loop
with its guard (`loop.py`), the run's folder (`run_folder.py`), and a watch on a discriminator that learns its images
by heart (`overfitting.py`). `cuda_graph.py` launches a step as one where a GPU would wait for the host, `plan.py`
computes what a run would take, and `small_clip.py` trains a CLIP where no weights are at hand.
"""
