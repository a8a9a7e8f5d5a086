"""From a prompt to pictures. `latent.py` computes w from text and noise, `views.py` lists the frames to draw,
`pipeline.py` draws them, `pictures.py` makes grids and animations, `files.py` reads and writes picture files.
`inference.py` makes a generator ready to sample, `page.py` and `explore.html` are the page of explore.py.
"""
