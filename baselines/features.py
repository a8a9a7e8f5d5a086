"""Frozen networks that a discriminator looks through (Projected GANs, Sauer et al. 2021): their features as tokens."""

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from common.cli import UserError, first_line
from weights.efficientnet import load_efficientnet

DINO = "vit_small_patch16_224.dino"


class FrozenFeatures(nn.Module):
    """Images [B, 3, R, R] in [−1, 1] → what a frozen network sees in them: tokens [B, C, N] of each of its taps.

    Its weights never change; gradients pass through it to the images. model: of timm; it returns the taps, maps
    [B, C, H, W] or a ViT's tokens [B, 1 + N, C], of which the first, CLS, is added to all others. side: the size that
    images are brought to. mean, std: of its training data, in [0, 1].
    """

    def __init__(self, model, side, mean, std):
        super().__init__()
        self.model, self.side = model.eval().requires_grad_(False), side
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def train(self, mode=True):
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images):
        images = F.interpolate(images, self.side, mode="bilinear", antialias=True)
        taps = self.model(((images + 1) / 2 - self.mean) / self.std)
        return [tokens(x) for x in (taps.values() if isinstance(taps, dict) else taps)]

    @property
    def channels(self):
        """C of each tap."""
        return [x.shape[1] for x in self(self.mean.new_zeros(1, 3, self.side, self.side))]


def tokens(x):
    """A map [B, C, H, W], or a ViT's tokens [B, 1 + N, C] with CLS first → [B, C, N]."""
    return x.flatten(2) if x.ndim == 4 else (x[:, 1:] + x[:, :1]).transpose(1, 2)


def vit_features(vit):
    """A ViT of timm as StyleGAN-T uses DINO's: the tokens that enter its blocks, and those at each quarter of them."""
    depth, config = len(vit.blocks), vit.default_cfg
    taps = ["pos_drop", *(f"blocks.{depth * part // 4 - 1}" for part in range(1, 5))]  # of 12 blocks: 2, 5, 8 and 11
    model = create_feature_extractor(vit.eval(), taps)
    return FrozenFeatures(model, vit.patch_embed.img_size[0], config["mean"], config["std"])


def dino():
    """DINO's ViT-S/16 at 224×224, which is StyleGAN-T's. Raises UserError where its weights cannot be had."""
    try:
        return vit_features(timm.create_model(DINO, pretrained=True))
    except Exception as error:  # the hub raises many kinds, all of them meaning that there are no weights
        raise UserError(
            f"the weights of {DINO} cannot be had ({first_line(error)}). Load them once where there is a network, or "
            "use the EfficientNet, which comes with a package"
        ) from error


def efficientnet(side=64):
    """EfficientNet-lite0, in place of DINO where nothing can be downloaded: the maps of five stages, 1/2 to 1/32."""
    return FrozenFeatures(load_efficientnet(features_only=True), side, mean=[0.5] * 3, std=[0.5] * 3)
