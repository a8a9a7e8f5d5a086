"""Aurora's generator, the first stage (the *base*): text and noise become a latent code w; w and the text become a
pyramid of images.

Read from the bottom up: Generator, Synthesis, SynthesisLevel, then the blocks. Sizes come from presets.py.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from attention import l2_attention, merge_heads, split_heads
from experts import Experts
from layers import Conv2d, Linear, full_precision, in_float32, lrelu, recomputed, rms_norm, upsample
from modulation import DeformableConv2d, ModulatedConv2d, ModulatedLinear, ToRGB, UpsamplingConv2d
from presets import GeneratorConfig
from router import Router, Routing
from text import TextHead


class Mapping(nn.Module):
    """z [B, z_dim] and the global text [B, text_dim], scaled to unit RMS, → the text-integrated code w [B, w_dim]."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        widths = [config.z_dim + config.text_dim, *[config.mapping_dim] * (config.mapping_layers - 1), config.w_dim]
        self.layers = nn.ModuleList(Linear(i, o, lr_mul=config.lr_mul) for i, o in itertools.pairwise(widths))

    @in_float32
    def forward(self, z, global_text):
        w = torch.cat([rms_norm(z), rms_norm(global_text)], dim=-1)
        for layer in self.layers:
            w = lrelu(layer(w))
        return w


# ----------------------------------------------------------------------------------------------------------------------
# Attention blocks, which contain the experts.


class ModulatedSelfAttention(nn.Module):
    """L2 self-attention over feature points [B, N, C], q and k untied, with an output projection modulated by w."""

    def __init__(self, dim, num_heads, w_dim):
        super().__init__()
        self.num_heads = num_heads
        self.to_qk = Linear(dim, 2 * dim, bias=False)  # rows: per head, q then k
        self.to_v = Linear(dim, dim, bias=False)
        self.proj_out = ModulatedLinear(dim, dim, w_dim)

    def forward(self, x, w):
        qk, v = (split_heads(project(x), self.num_heads) for project in (self.to_qk, self.to_v))
        q, k = qk.chunk(2, dim=-1)
        return self.proj_out(merge_heads(l2_attention(q, k, v)), w)


class CrossAttention(nn.Module):
    """L2 attention of feature points [B, N, C] to the local text [B, T, text_dim]."""

    def __init__(self, dim, num_heads, text_dim):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_kv = Linear(text_dim, 2 * dim, bias=False)  # rows: all of k, then all of v
        self.proj_out = Linear(dim, dim)

    def forward(self, x, local_text):
        k, v = self.to_kv(local_text).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.to_q(x), k, v))
        return self.proj_out(merge_heads(l2_attention(q, k, v)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, sparse mixture of experts: pre-norm residuals over [B, N, C] → the
    same shape, and the Routing.
    """

    def __init__(self, config: GeneratorConfig, num_experts):
        super().__init__()
        dim = config.num_heads * config.head_dim
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = ModulatedSelfAttention(dim, config.num_heads, config.w_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim, config.num_heads, config.text_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.router = Router(dim, num_experts, config.w_dim)
        self.experts = Experts(dim, num_experts)

    def forward(self, x, w, local_text):
        x = x + self.self_attention(self.norm1(x), w)
        x = x + self.cross_attention(self.norm2(x), local_text)
        u = self.norm3(x)
        routing = self.router(u, w)
        mixed = self.experts(u.flatten(0, 1), routing.expert_index.flatten(), routing.gate.flatten())
        return x + mixed.view_as(x), routing


class AttentionBlock(nn.Module):
    """GroupNorm, a projection to the attention width, transformer blocks, and one back: [B, C, H, W] → the same shape,
    and the Routing of each transformer block.
    """

    def __init__(self, config: GeneratorConfig, level):
        super().__init__()
        dim = config.num_heads * config.head_dim
        self.gain = config.attn_gain
        self.norm = nn.GroupNorm(32, level.channels)
        self.proj_in = Linear(level.channels, dim, bias=False)
        self.blocks = nn.ModuleList(TransformerBlock(config, level.num_experts) for _ in range(level.attn_depth))
        self.proj_out = Linear(dim, level.channels, bias=False)
        nn.init.zeros_(self.proj_out.weight)  # the block starts as the identity, times its gain

    def forward(self, x, w, local_text):
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, N, C]
        h = full_precision(h)  # the blocks add to it in float32
        routings = []
        for block in self.blocks:
            h, routing = block(h, w, local_text)
            routings.append(routing)
        h = self.proj_out(h).transpose(1, 2).view_as(x)
        return (x + h) * self.gain, routings


# ----------------------------------------------------------------------------------------------------------------------
# Convolutional blocks.


class FourierFeatures(nn.Module):
    """The input of StyleGAN3 (section 3.2): random waves, rotated and shifted by w, mixed: w → [B, C, size, size]."""

    def __init__(self, channels, size, w_dim):
        super().__init__()
        freqs = torch.randn(channels, 2)
        # Uniform in a disc: the length r of a normal vector becomes exp(−r²/4). Its square, exp(−r²/2), is uniform in
        # [0, 1].
        radii = freqs.norm(dim=1, keepdim=True)
        self.register_buffer("freqs", freqs / radii * (-radii.square() / 4).exp())
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        self.affine = Linear(w_dim, 4)
        nn.init.zeros_(self.affine.weight)
        self.affine.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])  # no rotation, no shift
        self.weight = nn.Parameter(torch.randn(channels, channels) / math.sqrt(channels))
        self.lr_scale = {"weight": 1 / math.sqrt(channels)}
        self.size = size

    @in_float32
    def forward(self, w):
        transform = self.affine(w)
        transform = transform / transform[:, :2].norm(dim=1, keepdim=True)  # the shift too, as in StyleGAN3
        cos, sin, *shift = transform.unbind(1)
        rotation = torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))  # [B, 2, 2]
        freqs = self.freqs @ rotation  # [B, C, 2]
        shift = torch.stack(shift, dim=1)[..., None]  # [B, 2, 1]
        phases = self.phases - (freqs @ shift)[..., 0]  # [B, C]
        centres = (torch.arange(self.size, dtype=w.dtype, device=w.device) + 0.5) / self.size - 0.5
        grid = torch.cartesian_prod(centres, centres).flip(1)  # [N, (x, y)], row by row
        waves = torch.sin(2 * math.pi * (freqs @ grid.T + phases[..., None]))  # [B, C, N]
        return (self.weight @ waves).unflatten(2, (self.size, self.size))


def level_conv(config, level, in_channels):
    """The last convolution of a block, which is deformable if the level says so."""
    if level.deformable:
        return DeformableConv2d(in_channels, level.channels, config.w_dim, level.num_kernels)
    return ModulatedConv2d(in_channels, level.channels, 3, config.w_dim, level.num_kernels)


class StartBlock(nn.Module):
    """The first block of the base's lowest level: Fourier features and one convolution, w → [B, C, size, size]."""

    def __init__(self, config: GeneratorConfig, level):
        super().__init__()
        self.fourier = FourierFeatures(config.fourier_channels, level.resolution, config.w_dim)
        self.conv = level_conv(config, level, config.fourier_channels)

    def forward(self, _, w):  # there is no level below
        return lrelu(self.conv(self.fourier(w), w))


class ConvBlock(nn.Module):
    """Two modulated convolutions and a skip: [B, C, H, W] → the same shape."""

    def __init__(self, config: GeneratorConfig, level):
        super().__init__()
        c, n = level.channels, level.num_kernels
        self.gain = config.residual_gain
        self.conv1 = ModulatedConv2d(c, c, 3, config.w_dim, n)
        self.conv2 = level_conv(config, level, c)

    def skip(self, x):
        return x

    def forward(self, x, w):
        h = lrelu(self.conv1(x, w))
        h = lrelu(self.conv2(h, w))
        return (h + self.skip(x)) * self.gain


class UpsamplingBlock(ConvBlock):
    """The first block of each level above the lowest: conv1 and the skip double the resolution, [B, in_channels, H, W]
    → [B, C, 2H, 2W].
    """

    def __init__(self, config: GeneratorConfig, level, in_channels):
        super().__init__(config, level)
        # This conv1 replaces that of ConvBlock.
        self.conv1 = UpsamplingConv2d(in_channels, level.channels, 3, config.w_dim, level.num_kernels)
        self.skip_conv = Conv2d(in_channels, level.channels, 1, bias=False)

    def skip(self, x):
        return upsample(self.skip_conv(x))


# ----------------------------------------------------------------------------------------------------------------------
# The networks.


@dataclass
class Output:
    """What a generator returns."""

    image: torch.Tensor  # [B, 3, R, R], about [−1, 1]
    pyramid: dict[int, torch.Tensor]  # resolution → image, low to high; the last is `image`
    w: torch.Tensor  # [B, w_dim], or [B, L, w_dim] as given to `synthesis`
    routings: dict[str, Routing]  # of every router, by "resolution.block.depth"


class SynthesisLevel(nn.Module):
    """All blocks of one resolution, and its to-RGB."""

    def __init__(self, config: GeneratorConfig, level, first_block):
        super().__init__()
        self.resolution = level.resolution
        rest = (ConvBlock(config, level) for _ in range(level.num_blocks - 1))
        self.blocks = nn.ModuleList([first_block, *rest])
        num_attentions = level.num_blocks if level.attn_depth else 0
        self.attentions = nn.ModuleList(AttentionBlock(config, level) for _ in range(num_attentions))
        has_rgb = level.resolution in config.resolutions
        self.to_rgb = ToRGB(level.channels, config.w_dim, level.num_kernels) if has_rgb else None

    @property
    def num_layers(self):
        """The number of layers that take a w of their own; to-RGB takes the last one's."""
        return len(self.blocks) + len(self.attentions)

    def forward(self, x, ws, local_text, encoded=None):
        """x: features of the level below, None at the base's lowest level; ws [B, L, w_dim], one w for each layer
        → features, the RGB of this level or None, {name: routing}.

        encoded: the features of the upsampler's encoder at this resolution, which are added after the first block.
        """
        codes, routings = iter(ws.unbind(1)), {}  # a code for a block, one for its attention, one for the next block, …
        for i, block in enumerate(self.blocks):
            w = next(codes)
            x = block(x, w)
            if i == 0 and encoded is not None:
                x = (x + encoded) * math.sqrt(0.5)
            if self.attentions:
                w = next(codes)
                x, routed = self.attentions[i](x, w, local_text)
                routings |= {f"{self.resolution}.{i}.{depth}": routing for depth, routing in enumerate(routed)}
        rgb = self.to_rgb(x, w) if self.to_rgb else None  # modulated by the last layer's w
        return x, rgb, routings


def add_to_upsampled(rgb, image):
    """The RGB of a level [B, 3, 2R, 2R] and the image below [B, 3, R, R] → the image at 2R."""
    return rgb + upsample(image)


class Synthesis(nn.Module):
    """w and the local text → images at every resolution, each the upsampled one below plus what its level adds.

    start: the class of the first block; the upsampler's starts from the encoder's features.
    """

    def __init__(self, config: GeneratorConfig, start=StartBlock):
        super().__init__()
        lowest = config.levels[0]
        self.levels = nn.ModuleList([SynthesisLevel(config, lowest, start(config, lowest))])
        for below, level in itertools.pairwise(config.levels):
            self.levels.append(SynthesisLevel(config, level, UpsamplingBlock(config, level, below.channels)))
        self.recompute = False  # gradient checkpointing: whether each level runs again in the backward pass

    @property
    def num_layers(self):
        return sum(level.num_layers for level in self.levels)

    def forward(self, w, local_text, resolution=None):
        """w [B, w_dim] for all layers, or [B, num_layers, w_dim]; stops at `resolution`, by default the highest."""
        return self.up(w, local_text, resolution)

    def up(self, w, local_text, resolution, x=None, encoded=None, image=None, add=add_to_upsampled):
        """Goes through the levels from low to high → Output. add: how a level's RGB is added to the image below, a
        function (rgb, image) → image.

        Only the upsampler gives x, the encoder's features at the lowest level; encoded, {resolution: its features}, of
        the other levels; and image, the picture to enlarge, from which the images grow.
        """
        ws = w if w.ndim == 3 else w[:, None].expand(-1, self.num_layers, -1)
        pyramid, routings, encoded = {}, {}, encoded or {}
        num_layers = [level.num_layers for level in self.levels]
        for level, level_ws in zip(self.levels, ws.split(num_layers, dim=1), strict=True):
            inputs = (x, level_ws, local_text, encoded.get(level.resolution))
            x, rgb, routed = recomputed(level, *inputs) if self.recompute else level(*inputs)
            if rgb is not None:
                image = rgb if image is None else add(rgb, image)
                pyramid[level.resolution] = image
            routings |= routed
            if level.resolution == resolution:
                break
        return Output(image, pyramid, w, routings)


class Generator(nn.Module):
    """Aurora's generator (section 3.2): a text head, a mapping network and a synthesis network.

    forward: z [B, z_dim] ~ N(0, 1); tokens [B, T, clip_width], the frozen text encoder's features after its last norm;
    eot [B], the index of the end-of-text token; resolution, the level to stop at, since training grows → Output.
    """

    def __init__(self, config: GeneratorConfig, synthesis=Synthesis):
        super().__init__()
        self.config = config
        self.text_head = TextHead(
            config.clip_width, config.text_dim, config.text_layers, config.num_heads, config.lr_mul, config.mix_tokens
        )
        self.mapping = Mapping(config)
        self.synthesis = synthesis(config)
        # The mean over training, as in the authors' file. Truncation uses that of a prompt, see sampling/latent.py.
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(self, z, tokens, eot, resolution=None):
        global_text, local_text = self.text_head(tokens, eot)
        w = self.mapping(z, global_text)
        return self.synthesis(w, local_text, resolution)

    @torch.no_grad()
    def update_w_avg(self, batch_mean, decay=0.995):
        """Moves the running mean of w toward a batch's mean, [w_dim]; not toward numbers that are not finite."""
        self.w_avg.lerp_(torch.where(batch_mean.isfinite(), batch_mean, self.w_avg), 1 - decay)
