"""The discriminator: GigaGAN's, multi-scale and text-conditional (sections 3.3 and 3.4 there).

Every image of the pyramid enters at its own stage and is scored after every stage from there on. So early stages learn
from early scores, and the generator is judged at each of its resolutions. At 64×64 there are 15 predictions for 5
inputs. It is also vision-aided: a 16th prediction scores the frozen CLIP's feature maps of the highest image.
"""

import math

import torch
from torch import nn

from attention import merge_heads, split_heads
from layers import Conv2d, Downsample, Linear, ResidualBlock, float32_region, full_precision, lrelu, rms_norm
from modulation import ModulatedLinear
from presets import DiscriminatorConfig
from text import TextHead

ATTN_GAIN = 0.3  # for the branch only: a scaled x would shrink at every block
LOGIT_GAIN = 0.25  # without it, a step of Adam changes a logit more than another caption does
CLIP_STAGE = "clip"  # the name of a further stage, whose maps come from CLIP's feature maps


def squared_l2_attention(qk, v):
    """softmax(−‖q − k‖₂²/√d)·v with q = k, over [B, heads, N, d]: twice differentiable, as R1 needs it.

    The distance itself has no gradient at zero, and here every point meets itself. |q|² is the same for all keys and
    cancels in the softmax. Autograd keeps the whole map in memory.
    """
    with float32_region(qk):
        qk = full_precision(qk)
        logits = (2 * qk @ qk.transpose(-1, -2) - qk.square().sum(-1)[..., None, :]) / math.sqrt(qk.shape[-1])
        attention = logits.softmax(-1)
    return attention.to(v.dtype) @ v


class TiedSelfAttention(nn.Module):
    """L2 self-attention with q = k, [B, C, H, W] → the same shape. R1 can differentiate it twice."""

    def __init__(self, channels, num_heads, head_dim):
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(32, channels)
        self.to_qk = Linear(channels, dim, bias=False)
        self.to_v = Linear(channels, dim, bias=False)
        self.proj_out = Linear(dim, channels)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):
        points = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        qk, v = (split_heads(project(points), self.num_heads) for project in (self.to_qk, self.to_v))
        h = self.proj_out(merge_heads(squared_l2_attention(qk, v)))
        return x + ATTN_GAIN * h.transpose(1, 2).view_as(x)


class ToPoint(nn.Module):
    """The last step down: a convolution without padding turns a map into one point, [B, C, side, side] → [B, D, 1, 1].
    From pictures larger than training's crops it makes several points.
    """

    def __init__(self, in_channels, out_channels, side=4):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, side, padding=0)

    def forward(self, x):
        return lrelu(self.conv(x))


class Stage(nn.Module):
    """One φ: self-attention and residual convolutions, as many as the level has, then the step to half the resolution.
    It has no forward: Discriminator.maps calls from_rgb and body, because other images join between them.
    """

    def __init__(self, config: DiscriminatorConfig, level, step):
        super().__init__()
        c, attn_depth = level.channels, level.attn_depth
        attentions = (TiedSelfAttention(c, config.num_heads, config.head_dim) for _ in range(attn_depth))
        blocks = (ResidualBlock(c) for _ in range(level.num_blocks))
        self.from_rgb = Conv2d(3, c, 1) if level.takes_images else None
        self.body = nn.Sequential(*attentions, *blocks, step)


class MapReader(nn.Sequential):
    """One of CLIP's feature maps to a single feature point: [B, C, side, side] → [B, D, 1, 1]."""

    def __init__(self, map_channels, side, channels):
        steps = []
        while side > 4:
            steps.append(Downsample(map_channels, channels))
            map_channels, side = channels, side // 2
        super().__init__(*steps, ToPoint(map_channels, channels, side))


class Head(nn.Module):
    """One ψ with its unconditional companion: D = LOGIT_GAIN · (ψ(map, t) + conv1×1(map)), for every feature point."""

    def __init__(self, channels, text_dim, num_layers):
        super().__init__()
        self.convs = nn.ModuleList(ModulatedLinear(channels, channels, text_dim) for _ in range(num_layers - 1))
        self.last = ModulatedLinear(channels, 1, text_dim)
        self.unconditional = Linear(channels, 1)

    def forward(self, x, text):
        """Feature maps x [B, C, H, W], text codes [B, text_dim] → logits [B, H·W]."""
        points = h = x.flatten(2).transpose(1, 2).contiguous()
        for conv in self.convs:
            h = lrelu(conv(h, text))
        return LOGIT_GAIN * full_precision(self.last(h, text) + self.unconditional(points)).squeeze(-1)


def deviation_in_groups(x, group):
    """For each of the maps [B, C, H, W] the standard deviation of each channel and point over its group, [B, C, H, W].
    A group is `group` maps in a row.
    """
    deviation = torch.sqrt(full_precision(x).unflatten(0, (-1, group)).var(1, correction=0) + 1e-8)
    return deviation.repeat_interleave(group, 0).to(x.dtype)


class Discriminator(nn.Module):
    """Pyramids {resolution: [B, 3, R, R]} and captions → logits {(input, stage): [B, N]}; larger means more like real.

    While the generator grows, the pyramid lacks the highest images, and their stages are skipped. An upsampler has
    no low images: those stages only process maps from above. `clip_maps` are CLIP's feature maps of the
    highest image, clip.see()[1], [B, C, side, side] of the shapes config.clip_maps; empty for an upsampler, whose
    discriminator is not vision-aided. The maps do not depend on the text, so a second caption for the same images needs
    only the heads: call maps() once and score() twice.

    With a group of several images, the last stage also reads how much the images of a group differ (StyleGAN's
    minibatch standard deviation). If they have the same caption, the discriminator notices a generator that draws the
    same picture under each z; only data/emoji.py makes such groups. If the size of a group does not divide the number
    of images, groups are smaller.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.text_head = TextHead(
            config.clip_width, config.text_dim, config.text_layers, config.num_heads, config.lr_mul
        )
        levels = {level.resolution: level for level in config.levels}
        stages, heads = {}, {}
        for resolution, level in levels.items():
            below = levels.get(resolution // 2)
            step = Downsample(level.channels, below.channels) if below else ToPoint(level.channels, level.channels)
            stages[str(resolution)] = Stage(config, level, step)
            width = below.channels if below else level.channels  # after the stage's step
            heads[str(resolution)] = Head(width, config.text_dim, config.head_layers)
        if config.clip_maps:
            heads[CLIP_STAGE] = Head(config.clip_channels, config.text_dim, config.head_layers)
        self.map_readers = nn.ModuleList(MapReader(*shape, config.clip_channels) for shape in config.clip_maps)
        self.stages, self.heads = nn.ModuleDict(stages), nn.ModuleDict(heads)
        self.resolutions, self.group = sorted(levels, reverse=True), config.group
        if config.group > 1:
            width = levels[self.resolutions[-1]].channels
            self.from_deviation = Conv2d(width, width, 1)

    def encode_text(self, tokens, eot):
        """The text encoder's token features [B, T, clip_width] and eot [B] → a text code of its own [B, text_dim]."""
        return rms_norm(full_precision(self.text_head(tokens, eot)[0]))

    def maps(self, pyramid, clip_maps):
        """→ {(input, stage): the feature map of that input image after that stage, [B, C, H/2, W/2] or 1×1 at last}.

        Both are named by their resolution. Each input joins those that entered above, and all go on as one batch:

            stage          16          8           4
            input 16  ──▶ (16, 16) ─▶ (16, 8) ─▶ (16, 4)
            input 8                ──▶ (8, 8) ──▶ (8, 4)
            input 4                           ──▶ (4, 4)

        CLIP is a stage of its own, with one feature point for each of its maps: [B, C, number of maps, 1].
        """
        points = [read(x) for read, x in zip(self.map_readers, clip_maps, strict=True)]
        maps = {(max(pyramid), CLIP_STAGE): torch.cat(points, dim=2)} if points else {}
        entered = {}  # input → its map, on the way down
        group = math.gcd(self.group, len(pyramid[max(pyramid)]))
        for resolution in self.resolutions:
            if resolution > max(pyramid):
                continue
            stage = self.stages[str(resolution)]
            if resolution in pyramid:
                entered[resolution] = lrelu(stage.from_rgb(pyramid[resolution]))
            together = torch.cat(list(entered.values()))  # [inputs · B, C, H, W]
            if self.group > 1 and resolution == self.resolutions[-1]:
                together = together + self.from_deviation(deviation_in_groups(together, group))
            outputs = stage.body(together).chunk(len(entered))
            entered = dict(zip(entered, outputs, strict=True))
            for entry, x in entered.items():
                maps[entry, resolution] = x
        return maps

    def score(self, maps, text):
        """The maps of B images and text codes [B, text_dim] → logits {(input, stage): [B, N]}."""
        logits = {}
        for stage in dict.fromkeys(stage for _, stage in maps):  # each once
            entries = [entry for entry, its_stage in maps if its_stage == stage]
            together = torch.cat([maps[entry, stage] for entry in entries])  # [inputs · B, C, H, W]
            outputs = self.heads[str(stage)](together, text.repeat(len(entries), 1)).chunk(len(entries))
            for entry, output in zip(entries, outputs, strict=True):
                logits[entry, stage] = output
        return logits

    def forward(self, pyramid, clip_maps, tokens, eot):
        """The logits of images with their captions. Training calls the parts: a second caption needs only `score`."""
        return self.score(self.maps(pyramid, clip_maps), self.encode_text(tokens, eot))
