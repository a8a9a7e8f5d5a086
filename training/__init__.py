"""What a run needs in addition to Aurora's step (`step.py`) and growth (`growth.py`): its loop (`loop.py`), its folder
(`run_folder.py`), and CUDA graphs of small steps (`cuda_graph.py`). `plan.py` computes what a run would take, and
`small_clip.py` trains a CLIP if no CLIP's weights can be downloaded.
"""
