"""What evaluation looks at pictures with: Inception, an image tower of open_clip, or the small CLIP."""

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

from clip import create, load_clip
from common.cli import UserError, first_line


class Extractor(NamedTuple):
    """A frozen network, as evaluation asks it. Its features are not normalized."""

    name: str  # of the network and its weights, and how it resizes
    images: Callable  # uint8 [B, 3, R, R] → features [B, D], float32
    texts: Callable | None  # captions → features [B, D], where it reads


def load_extractor(spec, option, device):
    """ "small", "inception", "inception:WEIGHTS.pth", or "MODEL:WEIGHTS" of open_clip, given by an option → Extractor.

    Each resizes as its own library does. Raises UserError where the weights cannot be had.
    """
    kind, _, path = spec.partition(":")
    if spec == "small":
        return small(device)
    return inception(path, device) if kind == "inception" else open_clip_model(spec, option, device)


def small(device):
    """The CLIP that the preset `shapes` is trained against, which therefore flatters it."""
    clip = load_clip("small", device)

    def images(pixels):
        return clip.encode_image(pixels.to(device).float() / 127.5 - 1)

    def texts(captions):
        return clip.encode_text(clip.tokenize(captions)).embedding

    return Extractor("small CLIP (models/clip.safetensors), resized to 32 by antialiased bicubic", images, texts)


def inception(path, device):
    """The Inception of the FID, converted from TensorFlow's graph, as in torch-fidelity; it resizes as TensorFlow 1."""
    if path and not Path(path).is_file():
        raise UserError(f"inception:{path}: there is no such file")
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], path or None).to(device)
    except Exception as error:  # no network, or a foreign file: torch and urllib raise many kinds
        raise UserError(
            f"inception: the weights cannot be had ({first_line(error)}); get torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth where there is a network, and pass inception:PATH"
        ) from error
    name = f"Inception v3 of torch-fidelity {torch_fidelity.__version__}, 2048 features, resized to 299 as TensorFlow 1"
    return Extractor(name, lambda pixels: network(pixels.to(device))[0], None)


def open_clip_model(spec, option, device):
    """Any model of open_clip, with the preprocessing it was trained with, done by Pillow as open_clip does it."""
    model = create(spec, option).to(device).eval()
    preprocessing = PreprocessCfg(**model.visual.preprocess_cfg)
    prepare = image_transform_v2(preprocessing, is_train=False)
    tokenizer = open_clip.get_tokenizer(spec.partition(":")[0])

    def images(pixels):
        return model.encode_image(torch.stack([prepare(to_pil_image(x)) for x in pixels.cpu()]).to(device)).float()

    def texts(captions):
        return model.encode_text(tokenizer(captions).to(device)).float()

    size, how = preprocessing.size, preprocessing.interpolation
    return Extractor(f"open_clip {open_clip.__version__} {spec}, resized to {size} by Pillow's {how}", images, texts)


def clip_score(images, texts):
    """The mean cosine between the features of pictures [N, D] and of their captions [N, D]."""
    return F.cosine_similarity(images.double(), texts.double()).mean().item()
