"""What a run needs around Aurora's step (`step.py`) and its growth (`growth.py`), which stand at the root: the tools of
its loop, with the guard (`loop.py`), and its folder (`run_folder.py`). `cuda_graph.py` launches a step as one where a
GPU would wait for the host, `plan.py` computes what a run would take, and `small_clip.py` trains a CLIP where no
weights are at hand.
"""
