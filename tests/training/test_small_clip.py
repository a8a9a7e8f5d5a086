"""The small CLIP for any captioned pictures."""

import torch

from clip import load_clip
from data.scenes import render, scene_or_twin
from training.small_clip import contrast, mislead


def test_misled_pictures_fit_their_captions_less_and_stay_near():
    clip = load_clip("small")
    scenes = [scene_or_twin(i, 9) for i in range(32)]
    text = clip.encode_text(clip.tokenize([scene.caption for scene in scenes])).embedding
    images = [render(scenes[:16], 16), render(scenes[16:], 32)]
    misled = mislead(clip, images, text, 0.3)
    assert all((a - b).abs().max() <= 0.3 for a, b in zip(images, misled, strict=True))
    noise = [x + 0.3 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x).sign() for x in images]
    assert contrast(clip, misled, text) > contrast(clip, noise, text) > 0
