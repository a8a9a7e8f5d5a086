"""The frozen networks of the perceptual loss: images → feature maps."""

import timm
import torch
from torch import nn

from common.cli import UserError, first_line
from weights.efficientnet import load_efficientnet

NETWORKS = ("efficientnet", "vgg16")


class ImageNetVGG(nn.Module):
    """VGG16's maps before each pool, as in LPIPS: images [B, 3, R, R] in [−1, 1] → five maps."""

    def __init__(self, with_weights):
        super().__init__()
        self.network = timm.create_model("vgg16.tv_in1k", pretrained=with_weights, features_only=True)
        config = self.network.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        return self.network(((images + 1) / 2 - self.mean) / self.std)


def perceptual_network(recipe, with_weights=True):
    """The network of a recipe's perceptual loss → a frozen module; None without this loss. Raises UserError.

    EfficientNet's weights come with a package. The weights of VGG, the network of LPIPS, are downloaded or cached by
    timm. with_weights: False for a plan, which needs only the sizes.
    """
    if not recipe.perceptual_weight:
        return None
    name = recipe.perceptual_network
    if name not in NETWORKS:
        raise UserError(f"--set perceptual_network={name}: choose one of {', '.join(NETWORKS)}")
    if name == "efficientnet":
        return load_efficientnet(features_only=True, with_weights=with_weights)
    try:
        network = ImageNetVGG(with_weights)
    except Exception as error:  # timm and the hub raise many kinds; all mean that there are no weights
        remedy = "use --set perceptual_network=efficientnet, or put timm's vgg16.tv_in1k into the cache of the hub"
        raise UserError(f"the weights of VGG16 are not available ({first_line(error)}); {remedy}") from error
    return network.eval().requires_grad_(False)
