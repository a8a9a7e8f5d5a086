"""From a prompt to pictures. `latent.py` goes from text and noise to w and on to images, `inference.py` computes once
what does not change, `views.py` lists frames to look at, `pictures.py` lays them out, `files.py` has their files.
`pipeline.py` is all of it from Python, `inversion.py` fits codes to a picture, `page.py` and
`explore.html` are the page of explore.py.
"""
