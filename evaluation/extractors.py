"""The frozen networks of evaluation: EfficientNet-lite0, Inception, a model of open_clip, or a small CLIP."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
import torch_fidelity
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import to_pil_image

from clip import BUILT_IN, create_open_clip, load_clip
from common.cli import UserError, first_line
from weights.efficientnet import load_efficientnet

EFFICIENTNET_SIDES = 96, 224  # pixels: of small images, and of those of 224 or more, which it was trained on


class Extractor(NamedTuple):
    """A frozen network and its functions. The features are not normalized."""

    name: str  # the network, its weights, and how it resizes
    images: Callable  # uint8 [B, 3, R, R] → features [B, D], float32
    texts: Callable | None  # captions → features [B, D]; None for a network without a text tower


def load_extractor(spec, device):
    """The Extractor called `spec`. Each resizes as its own library does.

    spec: "efficientnet", "inception", "inception:WEIGHTS.pth", a small CLIP (a name in clip.BUILT_IN, or a file of
    training/small_clip.py), or "MODEL:WEIGHTS" of open_clip. Raises UserError if the weights are not available.
    """
    kind, _, path = spec.partition(":")
    if kind == "inception":
        return inception(path, device)
    if spec == "efficientnet":
        return efficientnet(device)
    if spec in BUILT_IN or Path(spec).is_file():
        return small_clip(spec, device)
    return open_clip_model(spec, device)


def small_clip(spec, device):
    """A small CLIP. It favours generators that were trained against it."""
    clip = load_clip(spec, device)

    def images(pixels):
        return clip.encode_image(pixels.to(device).float() / 127.5 - 1)

    def texts(captions):
        return clip.read(captions).embedding

    path = BUILT_IN.get(spec, Path(spec))
    return Extractor(f"{clip.name} ({path.name}), resized to 32 by antialiased bicubic", images, texts)


def efficientnet(device):
    """The 1,280 features of EfficientNet-lite0 before its classifier, averaged over the image."""
    network = load_efficientnet().to(device, memory_format=torch.channels_last)  # three times as fast on a CPU
    low, high = EFFICIENTNET_SIDES

    def images(pixels):
        side = high if pixels.shape[-1] >= high else low  # 224 is five times as slow
        pixels = F.interpolate(pixels.to(device).float() / 127.5 - 1, side, mode="bicubic", antialias=True)
        maps = network.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        return network.forward_head(maps, pre_logits=True)

    resized = f"resized to {low}, from {high} up to {high}, by antialiased bicubic"
    return Extractor(f"EfficientNet-lite0 of ImageNet, 1280 features, {resized}", images, None)


def inception(path, device):
    """The Inception v3 of the usual FID, as torch-fidelity converts it from TensorFlow. It resizes as TensorFlow 1."""
    if path and not Path(path).is_file():
        raise UserError(f"inception:{path}: there is no such file")
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], path or None).to(device)
    except Exception as error:  # of many kinds: no network, or a foreign file
        raise UserError(
            f"inception: the weights are not available ({first_line(error)}); download torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth and give inception:PATH"
        ) from error
    name = f"Inception v3 of torch-fidelity {torch_fidelity.__version__}, 2048 features, resized to 299 as TensorFlow 1"
    return Extractor(name, lambda pixels: network(pixels.to(device))[0], None)


def open_clip_model(spec, device):
    """Any model of open_clip, with its own preprocessing by Pillow."""
    model = create_open_clip(spec).to(device).eval()
    preprocessing = PreprocessCfg(**model.visual.preprocess_cfg)
    prepare = image_transform_v2(preprocessing, is_train=False)
    tokenizer = open_clip.get_tokenizer(spec.partition(":")[0])

    def images(pixels):
        return model.encode_image(torch.stack([prepare(to_pil_image(x)) for x in pixels.cpu()]).to(device)).float()

    def texts(captions):
        return model.encode_text(tokenizer(captions).to(device)).float()

    size, how = preprocessing.size, preprocessing.interpolation
    return Extractor(f"open_clip {open_clip.__version__} {spec}, resized to {size} by Pillow's {how}", images, texts)
